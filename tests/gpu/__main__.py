"""What works on this machine's GPU, in under eight minutes: `python -m tests.gpu [NAME ...]`, or `make gpu-check`.

Exits with 0 if every check was made or skipped and none has failed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tests.gpu.runner import Report, Stopped, run_checks, stopped_by_signals
from tests.gpu.table import CHECKS

SECONDS_IN_ALL = 460.0


def main(arguments: list[str]) -> int:
    """Run what is asked for, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="checks to run, in the order of --list; all by default"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is known here after every check")
    parser.add_argument("--list", action="store_true", help="say what checks there are, and run none")
    parser.add_argument("--seconds-in-all", type=float, default=SECONDS_IN_ALL, help="no check goes on longer")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="what deadlines are multiplied by, on slow machines"
    )
    parser.add_argument("--fault", metavar="NAME", help="break the harness first, to see a check fail (see faults.py)")
    given = parser.parse_args(arguments)
    known = [check.name for check in CHECKS]
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"{', '.join(unknown)}: there is no such check; choose from {', '.join(known)}")
    checks = [
        replace(check, deadline_seconds=given.patience * check.deadline_seconds)
        for check in CHECKS
        if not given.names or check.name in given.names
    ]
    if given.list:
        for check in checks:
            where = "GPU" if check.needs_gpu else "any"
            print(f"{check.name:22} {where}  {check.deadline_seconds:4.0f} s  {check.claim}")
        return 0
    try:
        report = Report(given.json, checks)
    except OSError as error:
        parser.error(f"--json {given.json}: cannot be written ({error.strerror}); name a file in a folder of yours")
    try:
        with stopped_by_signals():
            run_checks(checks, report, seconds_in_all=given.seconds_in_all, fault=given.fault)
    except Stopped as stopped:
        print(f"{stopped}; {len(report.outcomes)} of {len(checks)} checks are told", flush=True)
        return stopped.exit_code
    print(f"\n{report.table()}", flush=True)
    return 0 if report.is_well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
