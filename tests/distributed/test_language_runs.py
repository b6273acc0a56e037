"""Runs on text from start to end: one token file for all ranks, exact resume with dropout, export and sampling."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.catalogue.causal_lm.task import BitsPerByte
from harness.catalogue.text.read import prepare_text
from harness.config.io import load_config
from harness.export import load_exported
from harness.export import main as export
from harness.observers.ledger import read_lines
from harness.sample import load as load_model
from harness.sample import write
from tests import helpers
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main, train_main_and_listen
from tests.sections import load

pytestmark = pytest.mark.slow


def write_config(folder: Path, **settings: Any) -> Path:
    """Twelve documents of a text that counting can predict, and a run with all that a resume could forget."""
    for number in range(12):
        lines = [f"{n} and {n + 1} are {2 * n + 1}.\n" for n in range(number, number + 40)]
        (folder / f"{number:02d}.txt").write_text("".join(lines))
    values: dict[str, Any] = {
        "run": {"name": "run", "output_root": str(folder), "max_steps": 24, "seed": 5},
        "model": {"kind": "gpt", "layers": 2, "width": 32, "heads": 2, "dropout": 0.1, "experts": {"count": 3}},
        "data": {
            "source": "text",
            "path": str(folder / "*.txt"),
            "block": 16,
            "tokenizer": {"kind": "bpe", "vocab_size": 280},
            "global_batch": 16,
        },
        "task": {"kind": "causal_lm"},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
        "schedule": {"kind": "cosine", "warmup_steps": 4},
        "clip": {"kind": "norm", "max_norm": 1.0},
        "early_stopping": {"metric": "val/bits_per_byte", "patience_evaluations": 9},
        "evaluation": {"every_steps": 6},
        "checkpoint": {"every_steps": 4},
        "tracking": {"log_every_steps": 3},
    }
    return helpers.write_config(folder / "run.yaml", values, **settings)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_a_run_on_text_with_dropout_comes_back_to_the_same_bits(tmp_path: Path, strategy: str) -> None:
    command = (str(write_config(tmp_path)), f"strategy.kind={strategy}", "run.max_steps=12")
    assert run_ranks(2, train_main, *command) == [0, 0]
    run = tmp_path / "run"
    wanted, newest = helpers.plain_ledger(run / "ledger.jsonl"), run / "checkpoints/step-00000012"
    whole = (newest / "model-00000.safetensors").read_bytes()
    # As if it had been killed before the last save: what came after the one before is gone.
    newest.rename(tmp_path / newest.name)
    assert run_ranks(2, train_main, *command) == [0, 0]
    started = [line["step"] for line in read_lines(run / "events.jsonl") if line["event"] == "started"]
    assert started == [0, 8]
    assert helpers.plain_ledger(run / "ledger.jsonl") == wanted
    assert (newest / "model-00000.safetensors").read_bytes() == whole


def test_the_ranks_of_a_run_read_one_token_file_and_score_alike(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    scores = []
    for world_size in (1, 2, 4):
        name = f"run.name=ranks-{world_size}"
        # The loss that evens out the experts' load looks at whole micro-batches, and so at how many ranks there are.
        overrides = ("model.dropout=0", "model.experts.load_balance=0")
        assert run_ranks(world_size, train_main, config, name, *overrides) == [0] * world_size
        lines = read_lines(tmp_path / f"ranks-{world_size}/ledger.jsonl")
        scores.append([line["metrics"] for line in lines if line["event"] == "evaluation"])
        assert {line["num_targets"] for line in lines if line["event"] == "update"} <= {16 * n for n in range(1, 17)}
    assert len(list((tmp_path / ".harness-cache").iterdir())) == 1
    for found in scores[1:]:
        for one, other in zip(found, scores[0], strict=True):
            assert one == pytest.approx(other, rel=1e-3)
    assert scores[0][-1]["val/bits_per_byte"] < scores[0][0]["val/bits_per_byte"]


def test_a_torn_token_file_ends_every_rank_with_exit_3_and_the_folder_to_remove(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    loaded = load_config(str(config)).config
    folder = prepare_text(loaded.data, seed=5)  # type: ignore[arg-type]
    (folder / "train.bin").write_bytes(b"torn")
    answers = run_ranks(2, train_main_and_listen, str(config))
    assert [code for code, _ in answers] == [3, 3]
    assert f"rm -r {folder}" in answers[0][1]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_an_exported_language_model_scores_as_it_did_and_writes_text(world_size: int, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    arguments = [str(config), "run.max_steps=120", "evaluation.every_steps=60", "model.dropout=0"]
    arguments.append("model.experts=null")  # which would want more updates to learn to count
    assert run_ranks(world_size, train_main, *arguments) == [0] * world_size
    out = tmp_path / "out"
    assert export([str(tmp_path / "run"), "--to", str(out)]) == 0
    described = json.loads((out / "config.json").read_bytes())
    loaded = load_config(str(config)).config
    rows = load(loaded.data, loaded.task, seed=5).validation
    network, tokenizer, context = load_model(out)
    assert context == 16
    metric = BitsPerByte(torch.from_numpy(tokenizer.token_bytes()))
    with torch.no_grad():
        metric.update(load_exported(out)(rows.inputs.long()), rows.targets.long())
    assert float(metric.compute()) == pytest.approx(described["metrics"]["val/bits_per_byte"], rel=1e-5)
    ids = write(
        network,
        tokenizer.encode(b"7 and 8").tolist(),
        end=tokenizer.end,
        context=context,
        num_tokens=12,
        temperature=0.0,
        generator=torch.Generator(),
    )
    assert tokenizer.decode(ids).startswith(b"7 and 8 are ")
    command = [
        sys.executable,
        "-m",
        "harness.sample",
        str(out),
        "--prompt",
        "7 and 8",
        "--temperature",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("7 and 8 are ")
