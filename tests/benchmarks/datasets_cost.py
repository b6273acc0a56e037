"""What tokenised rows of Hugging Face's `datasets` cost beside torch's DataLoader over the same set.

    python -m tests.benchmarks.datasets_cost [--rounds 15]

Both take the same batches of 64 in the same order, ten of each in turns, in one process without workers; the median of
the rounds counts, in CPU time. Rows that differ in length are padded, there by a collate with torch's `pad_sequence`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from harness.config.data import Pad
from harness.rows.batches import TrainingBatches
from harness.rows.dataset import DatasetRows
from harness.rows.order import BatchPlan

BATCH, NUM_ROWS, LONGEST, TAKEN = 64, 8192, 128, 10
KEYS = ("input_ids", "attention_mask")


def tokenised(*, shortest: int) -> datasets.Dataset:
    draw = np.random.default_rng(0)
    lengths = draw.integers(shortest, LONGEST, NUM_ROWS, endpoint=True).tolist()
    columns = {
        "input_ids": [draw.integers(0, 30_000, length).tolist() for length in lengths],
        "attention_mask": [[1] * length for length in lengths],
        "label": draw.integers(0, 2, NUM_ROWS).tolist(),
    }
    return datasets.Dataset.from_dict(columns)


def as_lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: [torch.tensor(value) for value in values] for name, values in batch.items()}


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    sequences = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in KEYS}
    return {**sequences, "label": torch.stack([row["label"] for row in rows])}


def compare(name: str, dataset: datasets.Dataset, *, rounds: int, is_ragged: bool = False) -> None:
    plan = BatchPlan(num_rows=NUM_ROWS, global_batch=BATCH, world_size=1, micro_batch=None, seed=0)
    rows = DatasetRows(dataset, seed=0, pad=Pad(pad=0) if is_ragged else None)
    rows.look()
    ours = TrainingBatches(rows, plan, rank=0, device=torch.device("cpu"), dtype=torch.float32)
    ids = [plan.sample_ids(position, 0).tolist() for position in range(rounds * TAKEN)]
    theirs = iter(DataLoader(dataset, batch_sampler=ids, collate_fn=padded if is_ragged else None))
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}

    def timed(who: str, take: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = [take() for _ in range(TAKEN)]
        spent[who].append((time.process_time() - began) / TAKEN * 1e6)
        return found[-1]

    positions = iter(range(rounds * TAKEN))
    for _ in range(rounds):
        here = timed("ours", lambda: ours.at(next(positions))[0].data)
        there = timed("theirs", lambda: next(theirs))
        assert all(torch.equal(here[key], there[key]) for key in there)
    ratio = median(here / there for here, there in zip(spent["ours"], spent["theirs"], strict=True))
    print(
        f"{name}: {median(spent['ours']):.0f} us a batch, DataLoader {median(spent['theirs']):.0f}, ratio {ratio:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    even, ragged = tokenised(shortest=LONGEST), tokenised(shortest=20)
    compare("rows of 128 tokens", even.with_format("torch"), rounds=rounds)
    compare("selected, in another order", even.shuffle(seed=0).with_format("torch"), rounds=rounds)
    compare("rows of 20 to 128 tokens, padded", ragged.with_format("torch"), rounds=rounds, is_ragged=True)
    compare("a transform that draws nothing", even.with_transform(as_lists), rounds=rounds)


if __name__ == "__main__":
    main()
