"""Draws runs: `python -m harness.report RUN [RUN ...] [--to FILE] [--png DIR]`. Never imports torch."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.errors import EXIT_DONE, ConfigError, HarnessError
from harness.record.files import replace_durably, storage_errors
from harness.report.draw import png
from harness.report.page import draw, page
from harness.report.read import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one HTML file about one run or several, and return the exit code."""
    parser = argparse.ArgumentParser(prog="harness report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory, such as runs/mnist-cnn")
    default = "RUN/report.html, of several runs ./report.html"
    parser.add_argument("--to", metavar="FILE", type=Path, help=f"default: {default}")
    parser.add_argument("--png", metavar="DIR", type=Path, help="also write each chart as an image in this folder")
    given = parser.parse_args(arguments)
    to = given.to or (given.runs[0] / "report.html" if len(given.runs) == 1 else Path("report.html"))
    try:
        report(given.runs, to=to, images=given.png)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def report(runs: Sequence[Path], *, to: Path, images: Path | None = None) -> None:
    """Write the report of `runs` to a file, and its charts as images into a folder; say what was left out.

    Raises:
        ConfigError: one of them is no run directory.
        StorageError: it cannot be written.
    """
    if len(set(map(Path.resolve, runs))) < len(runs):
        raise ConfigError(f"{', '.join(map(str, runs))}: give each run once")
    records = [read_run(run) for run in runs]
    names = [record.own_name for record in records]
    records = [replace(record, has_twin=names.count(record.own_name) > 1) for record in records]
    for record in records:
        for text in record.ignored:
            print(f"{record.status.directory}: {text}", file=sys.stderr)
    charts = draw(records)
    with storage_errors("write", to):
        to.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(to, page(records, charts).encode())
    print(f"report: {to}")
    if images:
        with storage_errors("write in", images):
            images.mkdir(parents=True, exist_ok=True)
            for chart in charts:
                png(chart, images / f"{chart.slug}.png")
        print(f"images: {len(charts)} in {images}")


if __name__ == "__main__":
    sys.exit(main())
