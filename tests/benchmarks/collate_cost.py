"""What a batch of rows costs, stacked and padded, beside torch's own: `python -m tests.benchmarks.collate_cost`.

The ways take turns, so that a busy machine slows all of them; each number is the median of their rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from harness.config.data import Pad
from harness.rows.collate import padded, stack

ROWS = 64
IDS = range(ROWS)
Ways = Mapping[str, Callable[[], Any]]


def stacking() -> dict[str, Ways]:
    """What stacks rows of each kind: ours first, torch's second."""
    rows: dict[str, list[Any]] = {
        "dict of 2 tensors": [{"x": torch.randn(16), "y": torch.tensor(float(i))} for i in IDS],
        "dict of 1 tensor": [{"x": torch.randn(16)} for _ in IDS],
        "tuple of 2 tensors": [(torch.randn(16), torch.tensor(i)) for i in IDS],
        "tuple of a tensor and a number": [(torch.randn(16), i) for i in IDS],
        "dict of a picture and a class": [{"x": torch.randn(3, 32, 32), "y": torch.tensor(i)} for i in IDS],
    }
    return {
        name: {
            "stack": lambda these=these: stack(these, IDS),
            "default_collate": lambda these=these: default_collate(these),
        }
        for name, these in rows.items()
    }


def padding() -> dict[str, Ways]:
    """What pads rows of two tensors of each length: ours first, torch's second."""
    return {
        "3 to 24 numbers": _padding(3, 25),
        "100 to 2,000 numbers": _padding(100, 2001),
        "50 to 400 vectors of 80": _padding(50, 401, 80),
    }


def _padding(least: int, most: int, *width: int) -> Ways:
    rows = [
        {"x": torch.randn(length, *width), "y": torch.arange(length)} for length in torch.randint(least, most, (ROWS,))
    ]
    pad = Pad(pad={"x": 0, "y": -100})
    return {
        "data.collate": lambda: padded(rows, IDS, pad),
        "pad_sequence": lambda: {
            "x": pad_sequence([row["x"] for row in rows], batch_first=True),
            "y": pad_sequence([row["y"] for row in rows], batch_first=True, padding_value=-100),
        },
    }


def measured(ways: Ways, rounds: int) -> dict[str, float]:
    """Return the microseconds of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(20):
                way()
            seconds[name].append((time.perf_counter() - began) / 20)
    return {name: statistics.median(found) * 1e6 for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"microseconds for {ROWS} rows, {rounds} rounds")
    for name, ways in {**stacking(), **padding()}.items():
        ours, theirs = measured(ways, rounds).items()
        print(f"{name:32} {ours[0]} {ours[1]:6.1f}  {theirs[0]} {theirs[1]:6.1f}  {ours[1] / theirs[1]:.2f} x")


if __name__ == "__main__":
    main()
