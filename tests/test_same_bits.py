"""That `python -m tests.same_bits` tells two runs apart by name, down to one bit, and leaves out what is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import same_bits
from tests.bits.cases import CASES, cases_of
from tests.bits.compare import compare_runs, ledger_difference, read_tensors, tensor_difference
from tests.bits.trees import RunFailed, Trainers, Tree, commit_of, worktree
from tests.neighbours import REPOSITORY

Line = dict[str, Any]


def update(step: int, **other: Any) -> Line:
    values = {"loss": 0.1 * step, "samples_seen": 8 * step, "seconds": 0.5, "grad_norm": 0.0, "applied": True}
    return {"event": "update", "step": step, **values, **other}


def evaluation(step: int, **metrics: Any) -> Line:
    return {
        "event": "evaluation",
        "step": step,
        "metrics": {"val/loss": 0.7, "val/confusion": [[3, 1], [0, 4]], **metrics},
    }


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (update(2, loss=math.nextafter(0.2, 1)), "update of step 2, loss: base 0.2, present 0.20000000000000004"),
        (update(2, grad_norm=-0.0), "update of step 2, grad_norm: base 0.0, present -0.0"),
        (update(2, loss=None), "update of step 2, loss: base 0.2, present None"),
        (update(2, applied=1), "update of step 2, applied: base True, present 1"),
        (update(2, new=3), "update of step 2, new: base (no such key), present 3"),
    ],
)
def test_an_update_that_differs_in_one_bit_is_told_by_its_step_its_key_and_both_values(
    changed: Line, told: str
) -> None:
    ledger = [update(1), update(2), update(3)]
    assert ledger_difference(ledger, [update(1), changed, update(3, loss=9.0)]) == told


def test_what_a_clock_or_the_allocator_decides_is_not_compared() -> None:
    assert ledger_difference([update(1)], [update(1, seconds=0.6, samples_per_second=3.0, memory_bytes=7)]) is None


def test_a_ledger_that_ends_early_is_told() -> None:
    assert ledger_difference([update(1), update(2)], [update(1)]) == "number of lines: base 2, present 1"


def test_scores_may_differ_by_their_last_digits_and_no_more() -> None:
    ledger = [evaluation(4)]
    assert ledger_difference(ledger, [evaluation(4, **{"val/loss": 0.7 * (1 + 1e-13)})]) is None
    other = 0.7 * (1 + 1e-11)
    told = f"evaluation of step 4, metrics.val/loss: base 0.7, present {other!r}"
    assert ledger_difference(ledger, [evaluation(4, **{"val/loss": other})]) == told
    told = "evaluation of step 4, metrics.val/confusion[1][0]: base 0, present 1"
    assert ledger_difference(ledger, [evaluation(4, **{"val/confusion": [[3, 1], [1, 4]]})]) == told


def write_run(
    folder: Path, changed: Mapping[str, torch.Tensor] | None = None, *, step: int = 4, ranks: int = 1
) -> Path:
    """Write what is compared of a run whose weights are spread over the files of so many ranks."""
    checkpoint = folder / f"checkpoints/step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMIT.json").write_text("{}")
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (update(1), evaluation(1))))
    model = {"a.weight": torch.linspace(0, 1, 6).reshape(2, 3), "b.bias": torch.ones(3, dtype=torch.bfloat16)}
    model |= changed or {}
    for rank in range(ranks):
        mine = {name: model[name] for name in sorted(model)[rank::ranks]}
        save_file(mine, checkpoint / f"model-{rank:05d}.safetensors")
    save_file({"a.weight/exp_avg": torch.zeros(2, 3)}, checkpoint / "optim-00000.safetensors")
    return folder


def with_one_bit_flipped(tensor: torch.Tensor, place: int) -> torch.Tensor:
    flipped = tensor.clone()
    flipped.view(torch.int32).reshape(-1)[place] ^= 1
    return flipped


def test_a_tensor_that_differs_in_one_bit_is_told_by_its_name_and_place(tmp_path: Path) -> None:
    weight = torch.linspace(0, 1, 6).reshape(2, 3)
    base = write_run(tmp_path / "base")
    assert compare_runs(base, write_run(tmp_path / "same")).difference is None
    other = write_run(tmp_path / "other", {"a.weight": with_one_bit_flipped(weight, 5)})
    assert compare_runs(base, other).difference == (
        "tensor model/a.weight: 1 of 6 elements differ, the first at 5: base 0x3f800000, present 0x3f800001"
    )


def test_a_tensor_of_another_type_or_shape_or_that_one_run_lacks_is_told(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base")
    other = write_run(tmp_path / "type", {"b.bias": torch.ones(3)})
    assert compare_runs(base, other).difference == "tensor model/b.bias: base BF16 [3], present F32 [3]"
    tensors = read_tensors(base / "checkpoints/step-00000004")
    assert sorted(tensors) == ["model/a.weight", "model/b.bias", "optim/a.weight/exp_avg"]
    lacking = {name: tensor for name, tensor in tensors.items() if name != "model/b.bias"}
    assert tensor_difference(tensors, lacking) == "tensor model/b.bias: only in base"
    assert tensor_difference(lacking, tensors) == "tensor model/b.bias: only in present"


def test_norms_of_parameters_among_the_events_are_compared_without_their_times(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("base", "same", "other")]
    for run, time, norm in zip(runs, ("1", "2", "3"), (0.5, 0.5, math.nextafter(0.5, 1)), strict=True):
        lines = [
            {"time": time, "event": "started"},
            {"time": time, "event": "gradients", "step": 1, "norms": {"a": norm}},
        ]
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = compare_runs(runs[0], runs[1])
    assert (comparison.difference, comparison.num_events) == (None, 1)
    told = "gradients of step 1, norms.a: base 0.5, present 0.5000000000000001"
    assert compare_runs(runs[0], runs[2]).difference == told


def test_it_does_not_count_which_rank_has_written_a_tensor_but_which_checkpoints_are_kept(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base")
    comparison = compare_runs(base, write_run(tmp_path / "spread", ranks=2))
    assert (comparison.difference, comparison.counts()) == (None, "1 updates, 1 evaluations, 3 tensors")
    told = "checkpoints: base step-00000004, present step-00000005"
    assert compare_runs(base, write_run(tmp_path / "later", step=5)).difference == told
    (tmp_path / "spread/checkpoints/step-00000004/COMMIT.json").unlink()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        compare_runs(base, tmp_path / "spread")


def test_every_config_is_compared_also_one_that_no_table_knows() -> None:
    configs = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
    assert {case.config for case in CASES} == {*configs}
    assert [case.name for case in cases_of(["brand_new"], ["brand_new"])] == ["brand_new"]
    assert {case.config for case in cases_of(configs, ["mnist_cnn"])} == {"mnist_cnn"}
    with pytest.raises(ValueError, match=r"there is no mnist_cn; there are digits_mlp, .*mnist_cnn"):
        cases_of(configs, ["mnist_cn"])


def test_a_clone_without_the_commit_is_told_so_and_compares_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert same_bits.main(["--base", "0123456789abcdef"]) == 2
    assert capsys.readouterr().out.startswith("skipped  all: this clone has no commit 0123456789abcdef; git fetch")


def commit_of_base() -> str:
    """Return the commit of version 0.1.0."""
    commit = commit_of(same_bits.BASE)
    if commit is None:
        pytest.skip(f"this clone has no commit {same_bits.BASE} to compare with; git fetch --unshallow brings it")
    return commit


@pytest.mark.slow
@pytest.mark.long
def test_the_digits_train_on_two_ranks_to_the_bits_of_version_0_1_0(capsys: pytest.CaptureFixture[str]) -> None:
    commit_of_base()
    code = same_bits.main(["mnist_cnn", "--ranks", "2", "--strategies", "ddp", "--jobs", "1"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("\nequal    ") == 2
    assert f"{same_bits.BASE}: harness is " in said
    assert f": harness is {REPOSITORY}/harness/__init__.py" in said


@pytest.mark.slow
@pytest.mark.long
def test_a_rate_that_differs_in_its_last_digits_is_told_and_so_is_the_wrong_package(tmp_path: Path) -> None:
    with worktree(commit_of_base(), tmp_path) as path:
        tree = Tree("base", path, tmp_path / "work")
        tree.work.mkdir()
        config = path / "configs/mnist_cnn.yaml"
        short = ("run.max_steps=2", "data.validation_fraction=0.95", "tracking.report=false", "schedule.warmup_steps=0")
        with Trainers() as trainers:
            base, _ = trainers.train(tree, config, short, ranks=1, out="base")
            other, _ = trainers.train(
                tree, config, (*short, "optim.peak_lr=2.0000000000000005e-3"), ranks=1, out="other"
            )
        difference = compare_runs(base, other).difference
        assert difference == "update of step 1, learning_rate: base 0.002, present 0.0020000000000000005"
        with pytest.raises(RunFailed, match="not that of"):
            Tree("present", tmp_path, tree.work).origin()
