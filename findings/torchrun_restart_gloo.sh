#!/usr/bin/env bash
# torch 2.13.0: torchrun --max-restarts starts the ranks again after one has failed, but a gloo process group of the
# second attempt cannot connect.
#
# With one agent on one machine, also with --standalone, every attempt is given the same store, whose keys bear no number of
# the attempt. A rank of the second that comes before another finds the address that the one of the first has left there,
# dials a port that nobody listens on, and ends with "Gloo connectFullMesh failed". So --max-restarts mends nothing for CPU ranks, and for those GPU
# jobs that have a gloo group beside NCCL. A store of one's own prefix by TORCHELASTIC_RESTART_COUNT works. Seen: the first
# attempt adds up to 2, the second raises, and torchrun ends with 1; with the prefix it ends with 0.
set -euo pipefail
trap 'echo "changed at line $LINENO"' ERR
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet torch==2.13.0
env/bin/python -m pip install --quiet numpy==2.4.6
cat > job.py <<'EOF'
import datetime, os, sys, time
import torch
import torch.distributed as dist

attempt, with_prefix = os.environ["TORCHELASTIC_RESTART_COUNT"], sys.argv[1] == "prefix"
if attempt == "1" and os.environ["RANK"] == "0":
    time.sleep(3)  # one rank is always later than another
timeout = datetime.timedelta(seconds=15)
if with_prefix:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
else:
    dist.init_process_group("gloo", timeout=timeout)
total = torch.ones(1)
dist.all_reduce(total)
print(f"attempt {attempt} of rank {dist.get_rank()} adds up to {total.item():g}", flush=True)
if attempt == "0" and dist.get_rank() == 1:
    os._exit(1)  # an error that another try would mend
if attempt == "0":
    dist.barrier()
EOF
run() {
    timeout 120 env/bin/python -m torch.distributed.run "${@:2}" --max-restarts 1 --nproc-per-node 2 job.py "$1" > said.txt 2>&1
}
for options in "" "--standalone"; do
    # shellcheck disable=SC2086
    if run plain $options; then echo "changed: the second attempt connects ($options)"; exit 1; fi
    grep -q "attempt 0 of rank 0 adds up to 2" said.txt
    grep -q "Gloo connectFullMesh failed" said.txt
    if grep -q "attempt 1" said.txt; then echo "changed: the second attempt adds up"; exit 1; fi
    # shellcheck disable=SC2086
    run prefix $options
    grep -q "attempt 1 of rank 1 adds up to 2" said.txt
done
echo "as described: the second attempt of torchrun 2.13.0 cannot connect over gloo, unless its store has a prefix of its own"
