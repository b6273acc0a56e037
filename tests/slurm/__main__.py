"""Interrupts runs on a live cluster at random moments: `python -m tests.slurm [TIMES]`, 20 of each style by default."""

import contextlib
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import Site, interrupt


def main() -> int:
    """Print one line a style: how many interruptions were saved and resumed; return 1 if one was not."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as root,
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
    ):
        cluster = SlurmCluster(2, Path(root))
        try:
            cluster.start()
            os.environ.update({name: cluster.environment[name] for name in ("SLURM_CONF", "PATH", "TMPDIR")})
            site = Site(cluster, Path(folder))
            is_right = [campaign(site, style, times=times) for style in ("torchrun", "srun")]
        finally:
            cluster.stop()
    return 0 if all(is_right) else 1


def campaign(site: Site, style: str, *, times: int) -> bool:
    """Interrupt one run so often, and compare its ledger with that of a run that nobody interrupted."""
    run = site.submit(f"disturbed-{style}", "run.max_steps=10000000", style=style, nodes=2)
    interrupt(run, random.Random(style), times=times)
    run.finish_soon()
    run.ends_as("COMPLETED")
    undisturbed = site.submit(f"undisturbed-{style}", f"run.max_steps={run.step()}", style=style, nodes=2)
    undisturbed.ends_as("COMPLETED", seconds=600)
    saved = sum(ended == (75, "requeue") for ended in run.causes())
    resumed = [line["step"] for line in run.events("started")[1:]]
    is_right = run.ledger() == undisturbed.ledger() and saved == run.restarts == times
    print(
        f"{style}: {saved} of {times} saved and resumed, at updates {resumed}; ledger of {len(run.ledger())} lines "
        f"{'equal to' if is_right else 'NOT THAT OF'} an undisturbed run",
        flush=True,
    )
    return is_right


if __name__ == "__main__":
    sys.exit(main())
