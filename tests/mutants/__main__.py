"""Try every mutant: `make mutants`, or `python -m tests.mutants [NAME ...]`, where a name may be a glob.

Each is made in a copy of the checkout, on which the tests are run that should see it, until one fails. Ends with 1 if
any mutant was seen by none, or not in time.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from tests.mutants.mutant import Mutant
from tests.mutants.runner import REPOSITORY, Outcome, Runner
from tests.mutants.table import MUTANTS

INTERRUPTED = 130


def main(arguments: Sequence[str]) -> int:
    """Try the mutants that are asked for, and return the exit code."""
    given = _parse(arguments)
    wanted = [mutant for mutant in MUTANTS if any(fnmatch(mutant.name, name) for name in given.names)]
    part, parts = given.part
    wanted = wanted[part - 1 :: parts]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            runner = Runner(
                REPOSITORY,
                Path(folder),
                tests_from=given.tests_from,
                deadline_seconds=given.deadline_seconds,
                logs=given.logs,
            )
            outcomes = _try_all(runner, wanted, given)
    except KeyboardInterrupt:
        print("stopped; nothing is left running", file=sys.stderr)
        return INTERRUPTED
    return 0 if all(outcome.end == "killed" for outcome in outcomes) else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], metavar="NAME")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="K/N", help="every N-th mutant, from the K-th on")
    parser.add_argument("--jobs", type=int, default=1, metavar="COUNT", help="so many mutants at a time")
    parser.add_argument("--deadline-seconds", type=float, default=180.0, metavar="SECONDS", help="for one mutant")
    parser.add_argument("--tests-from", metavar="COMMIT", help="with tests/ as it was then")
    parser.add_argument("--rest", action="store_true", help="run all other tests on those that survive")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what pytest said")
    given = parser.parse_args(arguments)
    for name in given.names:
        if not any(fnmatch(mutant.name, name) for mutant in MUTANTS):
            parser.error(f"no mutant is called {name}")
    commit = ["git", "rev-parse", "--quiet", "--verify", f"{given.tests_from}^{{commit}}"]
    if given.tests_from and subprocess.run(commit, cwd=REPOSITORY, capture_output=True, check=False).returncode:
        parser.error(f"--tests-from {given.tests_from}: there is no such commit; a clone without history has none")
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
    return given


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of several parts, such as 1/8")
    return int(part), int(parts)


def _try_all(runner: Runner, mutants: Sequence[Mutant], given: argparse.Namespace) -> list[Outcome]:
    outcomes: list[Outcome] = []
    began = time.monotonic()

    def try_one(mutant: Mutant) -> Outcome:
        outcome = runner.try_mutant(mutant)
        if given.rest and outcome.end == "survived":
            outcome = runner.try_mutant(mutant, rest=True)
        return outcome

    with ThreadPoolExecutor(given.jobs) as pool:
        tried = [pool.submit(try_one, mutant) for mutant in mutants]
        try:
            for future in as_completed(tried):
                outcomes.append(future.result())
                print(_line(outcomes[-1]), flush=True)
                if given.json:
                    given.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    _print_summary(outcomes, seconds=time.monotonic() - began)
    return outcomes


def _line(outcome: Outcome) -> str:
    end = outcome.end if outcome.end == "killed" else outcome.end.upper()
    return f"{end:15} {outcome.seconds:6.1f} s  {outcome.mutant}  {outcome.killed_by or ''}".rstrip()


def _print_summary(outcomes: Sequence[Outcome], *, seconds: float) -> None:
    counts = Counter(outcome.end for outcome in outcomes)
    told = ", ".join(f"{count} {end}" for end, count in counts.most_common())
    print(f"mutants: {len(outcomes)}, {told}; {seconds / 60:.0f} minutes")
    for outcome in outcomes:
        if outcome.end != "killed":
            print(f"  {outcome.end}: {outcome.mutant}")
    for kind in ("red_anyway", "unsteady"):
        for test in sorted({test for outcome in outcomes for test in getattr(outcome, kind)}):
            print(f"  {'fails without a mutant too' if kind == 'red_anyway' else 'failed and then did not'}: {test}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
