"""The fraud story in variants of configs/fraud_mlp.yaml: `python -m tests.benchmarks.fraud_variants`.

Prints a markdown table: the best F1 of the rare class over the validation rows, its epoch and accuracy, and the best
AUC.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.io import load_config
from harness.examples.prepare import prepare
from harness.observers.ledger import read_lines

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs/fraud_mlp.yaml"

NO_NORM, NO_DROPOUT, NO_WEIGHTS = "model.norm=none", "model.dropout=0.0", "task.class_weights=null"
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (NO_NORM, NO_DROPOUT, NO_WEIGHTS),
    "dropout only": (NO_NORM, NO_WEIGHTS),
    "BatchNorm only": (NO_DROPOUT, NO_WEIGHTS),
    "both, without class weights": (NO_WEIGHTS,),
    "class weights only": (NO_NORM, NO_DROPOUT),
    "both, with class weights": (),
}
"""The chapter's four, and two that say which of the last one's parts makes the difference."""


@dataclass(frozen=True)
class Outcome:
    """What one variant came to."""

    f1: float
    """The best of all evaluations."""
    epochs: int
    """Until the evaluation that had it."""
    accuracy: float
    """Of that evaluation."""
    auc: float
    """The best of all evaluations: how well the dead are ranked, wherever the line is drawn."""


def train_cold(*arguments: str) -> None:
    """Train in a process of its own."""
    command = [sys.executable, "-m", "harness.train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as `harness launch` has it: more threads only wait
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL, env=environment)


def measure(
    variant: str,
    *,
    root: Path,
    output_root: Path,
    overrides: Sequence[str] = (),
    train: Callable[..., object] = train_cold,
) -> Outcome:
    """Train one variant for all of its epochs.

    Args:
        train: takes the arguments of `python -m harness.train`.
    """
    arguments = [
        *(f"run.name={variant.replace(' ', '-').replace(',', '')}", f"run.output_root={output_root}"),
        *(f"data.path={root / 'fraud.parquet'}", "early_stopping=null", *VARIANTS[variant], *overrides),
    ]
    train(str(CONFIG), *arguments)
    directory = load_config(CONFIG, arguments).config.run_directory
    lines = [line for line in read_lines(directory / "ledger.jsonl") if line["event"] == "evaluation"]
    scores = [line["metrics"] for line in lines]  # one an epoch
    best = max(range(len(scores)), key=lambda epoch: scores[epoch]["val/f1"])
    auc = max(score["val/auc"] for score in scores)
    return Outcome(scores[best]["val/f1"], best + 1, scores[best]["val/accuracy"], auc)


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the outcomes as markdown."""
    lines = [
        "| variant | F1 of the dead | epochs to the best | accuracy there | best AUC |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {outcome.f1:.3f} | {outcome.epochs} | {outcome.accuracy:.3f} | {outcome.auc:.3f} |"
        for name, outcome in outcomes.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Train them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the data are, or are put")
    parser.add_argument("--seed", type=int, default=42)
    given = parser.parse_args()
    print(prepare("fraud", given.root), file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="harness-fraud-") as folder:
        places = {"root": given.root.resolve(), "output_root": Path(folder)}
        outcomes = {name: measure(name, **places, overrides=[f"run.seed={given.seed}"]) for name in VARIANTS}
    print(table(outcomes))


if __name__ == "__main__":
    main()
