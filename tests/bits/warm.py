"""Trains runs of one version of the package, each on ranks forked from this process, which has imported the libraries.

`python -P tests/bits/warm.py TREE` reads a JSON object a line from its standard input, trains, and answers with one.
A rank does what `python -m harness.train` does, in a process that has imported torch but nothing of the package, and
ends with WRONG_PACKAGE if `harness` is not the one of TREE.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

WRONG_PACKAGE = 99
PR_SET_PDEATHSIG = 1
LIBRARIES = (
    *("numpy", "torch", "torch._dynamo", "torch.distributed", "torch._inductor.compile_fx", "datasets", "accelerate"),
    *("torchmetrics.classification", "torchmetrics.regression", "rich.console", "pydantic", "tokenizers"),
    *("transformers.models.bert.modeling_bert", "transformers.integrations.deepspeed", "accelerate.utils.deepspeed"),
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2"),
    *("deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.ep_repack"),
)


def main(tree: str) -> None:
    """Answer requests until the input ends."""
    _die_with_parent()
    sys.path.insert(0, tree)
    _import_libraries()
    for line in sys.stdin:
        print(json.dumps(_train(Path(tree), json.loads(line))), flush=True)


def _import_libraries() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed asks when it is imported
    for name in LIBRARIES:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    if "deepspeed" in sys.modules:
        importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - asked once, not by every rank
    del os.environ["DS_ACCELERATOR"]
    gc.collect()
    gc.freeze()  # or a collection in a rank would go through all that was imported


def _train(tree: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return the exit code of each rank, where a signal is negative, and the seconds that all took."""
    start = time.monotonic()
    pids = [_fork(tree, rank, request) for rank in range(request["world_size"])]
    codes = _wait(pids, until=start + request["deadline_seconds"])
    return {"codes": codes, "seconds": time.monotonic() - start}


def _wait(pids: list[int], *, until: float) -> list[int]:
    """Return the exit codes of these children; once one has failed, the others have ten seconds."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in (pid for pid in pids if pid not in codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                until = min(until, time.monotonic() + 10) if codes[pid] else until
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _fork(tree: Path, rank: int, request: dict[str, Any]) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        _die_with_parent()
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor, other in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(other, descriptor)
        _set_environment(rank, request["world_size"], request["port"])
        code = _be_rank(tree, request["arguments"])
    finally:  # whatever happens, a rank does not go on as a copy of its parent
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _set_environment(rank: int, world_size: int, port: int) -> None:
    """Say what torchrun says of a rank; one alone is started without it."""
    if world_size == 1:
        return
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _be_rank(tree: Path, arguments: list[str]) -> int:
    import harness

    if not Path(harness.__file__).resolve().is_relative_to(tree.resolve()):
        print(f"harness is {harness.__file__}, not that of {tree}")
        return WRONG_PACKAGE
    sys.argv = ["harness.train", *arguments]
    try:
        runpy.run_module("harness.train", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))


if __name__ == "__main__":
    main(sys.argv[1])
