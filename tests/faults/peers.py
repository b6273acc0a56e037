"""The same faults, done to our checkpoints and to those of others.

`python -m tests.faults.peers [--systems NAME ...]` prints a markdown table; what each error said goes to stderr. Every
cell is a run: two ranks save steps 10 and 20, something happens, fresh ranks resume, and the bits of their weights,
moments and random states (of what the system saves) are compared with what was saved.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tests.distributed.ranks import RankFailed, free_port, run_ranks, start_rank
from tests.faults import faults
from tests.faults.jobs import STEPS, SYSTEMS, WORLD_SIZE, Resumed, Saved, System, resume, system_class, train_and_save

OLDER, NEWEST = STEPS
DEADLINE_SECONDS = 60.0
ECHOES = ("timed out", "timeout", "closed by peer", "connection reset", "broken pipe", "peer closed")
"""What a rank says that only waited for another one."""
KINDS = {"model": "weights", "optim": "moments", "partition": "optimizer state", "random": "random state"}

NOTES = (
    "killed: the kernel ends the process when a file would grow beyond 8 kB; the other rank is killed a second later.",
    "torch.save has one file a checkpoint, so one that is exchanged is another whole checkpoint.",
    "torch.save and DCP do not choose what to load: here that is the newest folder with checkpoint.pt, or .metadata.",
    "One checkpoint kept: keep_last=1, total_limit=1 (Accelerate), or the same name every time (the others).",
    "Exchanged: both checkpoints are damaged, so there is nothing whole to resume from.",
    "At another number of ranks weights and moments are compared, random states are not.",
)


class Cells:
    """Measures one system, one fault at a time."""

    def __init__(self, system: str, temporary: Path) -> None:
        self.system, self.temporary = system, temporary
        self.kind: type[System] = system_class(system)
        self.undisturbed = temporary / "undisturbed"
        self.saved: list[Saved] = run_ranks(
            WORLD_SIZE, train_and_save, system, str(self.undisturbed), deadline_seconds=DEADLINE_SECONDS
        )
        self._num_copies = 0

    # ------------------------------------------------------ the faults

    def faults(self) -> dict[str, Callable[[], str]]:
        """Return the rows of the table; calling one measures its cell."""
        return {
            "nothing": lambda: self.resumed(self.copy()),
            **{
                f"rank {rank} killed within a file of the second save{kept}": (
                    lambda rank=rank, keep_one=keep_one: self.killed(rank, keep_one=keep_one)
                )
                for keep_one, kept in ((False, ""), (True, ", one checkpoint kept"))
                for rank in range(WORLD_SIZE)
            },
            **{name: (lambda damage=damage: self.damaged(damage)) for name, damage in faults.DAMAGES.items()},
            "disk full in the second save": self.disk_full,
            "2 ranks saved, 1 loads": lambda: self.resumed(self.copy(), world_size=1),
            "2 ranks saved, 3 load": lambda: self.resumed(self.copy(), world_size=3),
        }

    def killed(self, rank: int, *, keep_one: bool) -> str:
        """One rank dies within a file; the launcher kills the others a second later."""
        directory, port = self.fresh(), free_port()
        arguments = (self.system, str(directory), keep_one, rank)
        started = [start_rank(r, WORLD_SIZE, port, train_and_save, arguments) for r in range(WORLD_SIZE)]
        victim = started[rank][0]
        victim.join(DEADLINE_SECONDS)
        has_died = victim.exitcode != 0
        time.sleep(1.0 if has_died else 0.0)
        for process, connection in started:
            process.kill()
            process.join()
            connection.close()
        return self.resumed(directory, keep_one=keep_one) if has_died else f"(rank {rank} writes no large file)"

    def damaged(self, damage: Callable[[Path, Path], None]) -> str:
        directory = self.copy()
        damage(self.kind.folder(directory, NEWEST), self.kind.folder(directory, OLDER))
        return self.resumed(directory)

    def disk_full(self) -> str:
        """The disk has room for one checkpoint and a half."""
        sizes = [path.stat().st_size for path in faults.files_in(self.kind.folder(self.undisturbed, NEWEST))]
        pages = sum(-(-size // 4096) for size in sizes)
        directory = self.fresh()
        try:
            with faults.small_disk(directory, num_bytes=4096 * (pages * 3 // 2)):
                saved = run_ranks(
                    WORLD_SIZE, train_and_save, self.system, str(directory), deadline_seconds=DEADLINE_SECONDS
                )
                heard = self.heard([each.problem for each in saved]) or "NO ERROR"
                return f"save: {heard}; then {self.resumed(directory)}"
        except faults.NotPermitted as reason:
            return f"skipped: {reason}"

    # ------------------------------------------------------ what comes of them

    def fresh(self) -> Path:
        self._num_copies += 1
        return self.temporary / f"copy-{self._num_copies}"

    def copy(self) -> Path:
        directory = self.fresh()
        shutil.copytree(self.undisturbed, directory)
        return directory

    def resumed(self, directory: Path, *, keep_one: bool = False, world_size: int = WORLD_SIZE) -> str:
        """Resume from a directory; say what came of it, and where that is an error, whether step 10 is still there."""
        found = self.loaded(directory, keep_one, None, world_size)
        if not found.startswith("error") or world_size != WORLD_SIZE:
            return found
        by_hand = self.loaded(directory, keep_one, OLDER, world_size)
        if by_hand == f"resumes from {OLDER}":
            return f"{found}; {OLDER} loads by hand"
        return f"{found}; nothing to fall back to"

    def loaded(self, directory: Path, keep_one: bool, step: int | None, world_size: int) -> str:
        try:
            arguments = (self.system, str(directory), keep_one, step)
            ranks: list[Resumed] = run_ranks(world_size, resume, *arguments, deadline_seconds=DEADLINE_SECONDS)
        except RankFailed as failure:
            return f"error: {str(failure).splitlines()[-1]}"
        if problem := self.heard([rank.problem for rank in ranks]):
            return f"error: {problem}"
        steps = {rank.step for rank in ranks}
        if steps == {None}:
            return "starts afresh, silently"
        if len(steps) > 1:
            return f"RANKS DISAGREE: {[rank.step for rank in ranks]}"
        wrong = set.union(*(self.wrong(number, rank, world_size) for number, rank in enumerate(ranks)))
        found = f"resumes from {ranks[0].step}"
        return f"{found} with wrong {', '.join(sorted(wrong))}, silently" if wrong else found

    def wrong(self, number: int, rank: Resumed, world_size: int) -> set[str]:
        """Say what of a rank is not what was saved at its step; what is a rank's own belongs to a number of ranks."""
        as_saved = world_size == WORLD_SIZE
        wanted = self.saved[number if as_saved else 0].digests.get(rank.step or 0, {})
        different = {key for key in wanted.keys() | rank.digests.keys() if wanted.get(key) != rank.digests.get(key)}
        kinds = {key.partition("/")[0] for key in different}
        return {KINDS[kind] for kind in kinds if as_saved or kind not in ("random", "partition")}

    def heard(self, problems: list[str]) -> str:
        """Say which ranks have which error, with the words on stderr; ranks that only waited are not counted."""
        if not any(problems):
            return ""
        for rank, problem in enumerate(problems):
            print(f"  {self.system}, rank {rank}: {' '.join(problem.split())[:300]}", file=sys.stderr)
        first_hand = {
            rank: problem.partition(":")[0]
            for rank, problem in enumerate(problems)
            if problem and not any(echo in problem.lower() for echo in ECHOES)
        }
        if not first_hand:
            return "a time-out"
        where = "all ranks" if len(first_hand) == len(problems) else f"rank {', '.join(map(str, first_hand))}"
        return f"{'/'.join(dict.fromkeys(first_hand.values()))} ({where})"


def measure(systems: list[str], wanted: str = "") -> dict[str, dict[str, str]]:
    """Return the cells, system by system, of all faults whose name contains `wanted`."""
    table = {}
    for system in systems:
        with tempfile.TemporaryDirectory() as temporary:
            cells = Cells(system, Path(temporary))
            table[system] = {}
            for name, cell in cells.faults().items():
                if wanted in name:
                    table[system][name] = cell()
                    print(f"{system} | {name} | {table[system][name]}", file=sys.stderr, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--fault", default="", help="only faults whose name contains this")
    arguments = parser.parse_args()
    table = measure(arguments.systems, arguments.fault)
    print(
        f"Newest checkpoint: step {NEWEST}; the one before: step {OLDER}. "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "accelerate"))
        + ".\n"
    )
    print(f"| fault | {' | '.join(table)} |\n|---{'|---' * len(table)}|")
    for name in next(iter(table.values())):
        print(f"| {name} | {' | '.join(cells[name] for cells in table.values())} |")
    print("\n" + "\n".join(f"- {note}" for note in NOTES))


if __name__ == "__main__":
    main()
