"""What user code can break, found before the first update and told: as an error, or as a promise that is not made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.doctor.first_rows import check_network
from harness.errors import ConfigError
from harness.observers.console import promised
from harness.record.json_lines import read_events
from harness.strategy.build import moved
from harness.strategy.untouched import no_trace
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main_and_listen
from tests.distributed.starts import train_on_standing_ranks
from tests.helpers import write_config

PARTS = '''
"""Parts that have one fault each."""
import os
import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import harness


CALLS, SEEN = [], []


@harness.model("tower")
class Tower(nn.Module):
    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault = fault
        if fault == "built by rank":
            torch.manual_seed(int(os.environ["RANK"]))
        self.body, self.spare, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8) if fault == "batch norm" else nn.Identity()
        self.calls, self.queue, self.kept, self._kept = 0, deque(), [], np.zeros(1)
        if fault == "lazy":
            self.spare = nn.LazyLinear(8)
        if fault == "complex":
            self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))
        if fault == "complex buffer":
            self.register_buffer("phase", torch.ones(8, dtype=torch.complex64) * 1j, persistent=False)
        if fault == "buffer by rank":
            self.register_buffer("noise", torch.full((8,), float(os.environ["RANK"])), persistent=False)
        if fault == "raises when built":
            raise RuntimeError("no weights today")

    def forward(self, x, *, flag=None):
        found = self.norm(self.body(x))
        match self.fault:
            case "counts":
                self.calls += 1
            case "counts outside":
                CALLS.append(1)
                found = found * len(CALLS)
            case "keeps tensors" if self.training:
                found = found + sum(kept.mean() for kept in self.kept)
                self.kept = [found.detach()]
            case "keeps in private" if self.training:
                self._kept += 1
            case "shows":  # what is looked at by people, and shapes, are no state
                self.shown, self.rows, self._mask = found.detach(), len(x), torch.ones(len(x), 1)
            case "spare on rank 1" if os.environ["RANK"] == "1":
                found = found + self.spare(found)
            case "spare first on rank 1":
                order = [self.spare, self.head] if os.environ["RANK"] == "1" else [self.head, self.spare]
                return sum(layer(found).sum(-1) for layer in order)
            case "spare in training" if self.training:
                found = found + self.spare(found)
            case "spare for some rows" if (x[:, 0] > 0.8).any():
                found = found + self.spare(found) * (x[:, :1] > 0.8)
            case "drops the spare" if not self.training or torch.rand(()) < 0.5:
                found = found + self.spare(found)
            case "clamps":
                self.head.weight.data.mul_(0.9)
            case "mixes rows":
                found = found - found.mean(dim=0)
            case "dropout":
                found = torch.nn.functional.dropout(found, 0.5, self.training)
            case "complex buffer":
                found = found * (self.phase * -1j).real  # 1, if the imaginary part is still there
            case "returns an object":
                return SimpleNamespace(found=self.head(found))
            case "log":
                found = found.log()
        return self.head(found).squeeze(-1)


@harness.model("pair")
class Pair(Tower):
    def forward(self, x, y):
        return super().forward(x)


@harness.data("points")
class Points(torch.utils.data.Dataset):
    def __init__(self, num_rows: int = 24, fault: str = ""):
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_rows, 4, generator=draw)
        self.fault, self.own = fault, torch.Generator().manual_seed(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = torch.rand(4, generator=self.own) if self.fault == "own generator" else torch.zeros(4)
        if self.fault == "raises late" and os.environ["RANK"] == "1" and SEEN.append(i) is None and len(SEEN) > 300:
            raise KeyError("pixels")
        if self.fault == "raises" and i == 11:
            raise KeyError("pixels")
        return {"x": self.x[i] + noise, "y": self.x[i].sum(), "age": float(i), "name": f"row {i}"}


@harness.data("collated")
class Collated(Points):
    def collate(self, rows):
        return {"x": torch.stack([row["x"] for row in rows]), "y": torch.stack([row["y"] for row in rows])}


@harness.task("unweighted")
class Unweighted:
    def __init__(self, values: int = 1):
        self.values = values

    def forward(self, network, batch):
        return network(batch["x"])

    def loss(self, outputs, batch):
        each = F.mse_loss(outputs, batch["y"], reduction="none")
        return each if self.values == 1 else each.unsqueeze(1).expand(-1, self.values)


@harness.task("sum")
class Sum:
    mixes_rows = False

    def __init__(self, fault: str = "", weight: float = 1.0):
        self.fault, self.weight, self.center = fault, weight, 0.0
        self.mixes_rows = fault == "says that it mixes rows"

    def forward(self, network, batch):
        if self.fault == "reaches in":
            return network(batch["x"]) * network.head.weight.sum()
        if self.fault == "age":
            return network(batch["x"], age=batch["age"])
        return network(batch["x"])

    def loss(self, outputs, batch):
        each = F.mse_loss(outputs, batch["y"], reduction="none")
        if self.fault == "keeps a mean" and outputs.requires_grad:
            self.center = 0.9 * self.center + outputs.detach().mean()
            each = each + self.center
        if self.fault in ("mixes rows", "says that it mixes rows"):
            return each - each.mean()
        if self.fault == "nan":
            return torch.where(batch["age"] == 3, torch.nan, each)
        return each.mean() if self.fault == "mean" else each

    def weights(self, batch):
        return torch.full_like(batch["y"], self.weight)

    def metrics(self):
        return {"far": Far()} if self.fault == "metric" else {}


class Far:
    def __init__(self):
        self.sum = torch.zeros(())

    def update(self, outputs, targets):
        self.sum += F.l1_loss(outputs, targets)

    def compute(self):
        return self.sum


@harness.task("bare")
class Bare:
    def loss(self, outputs, batch):
        return outputs


@harness.task("slip")
class Slip:
    def loss(self, outputs, batch):
        return outputs

    def weigths(self, batch):
        return batch["y"]
'''


def write(folder: Path, **keys: Any) -> Path:
    """Write a configuration of two updates with one fault in a model, data or task."""
    (folder / "faulty.py").write_text(PARTS)
    return write_config(
        folder / "run.yaml",
        {
            "use": ["faulty.py"],
            "run": {"name": "a", "max_steps": 2, "output_root": str(folder / "runs")},
            "model": {"kind": "tower", **keys.get("model", {})},
            "data": {"source": "points", "global_batch": 8, **keys.get("data", {})},
            "task": {"kind": "sum", **keys.get("task", {})},
            "optim": {"kind": "adamw", "peak_lr": 0.01},
            "tracking": {"report": False},
        },
    )


def start(folder: Path, *overrides: str, ranks: int = 2, **keys: Any) -> list[tuple[int, str]]:
    """Train with one fault in a model, data or task."""
    return train_on_standing_ranks(ranks, str(write(folder, **keys)), *overrides)


def promises(folder: Path) -> dict[str, tuple[str, str]]:
    """Name to verdict and reason, as run.json has them."""
    told = json.loads((folder / "runs/a/run.json").read_bytes())["promises"]
    (event,) = [event for event in read_events(folder / "runs/a") if event["event"] == "promises"]
    assert event["promises"] == told
    assert event["seconds"] > 0
    return {promise["name"]: (promise["verdict"], promise["reason"]) for promise in told}


def notices(folder: Path) -> str:
    return "\n".join(event["text"] for event in read_events(folder / "runs/a") if event["event"] == "notice")


HELD = ("held", "")


@pytest.mark.parametrize("fault", ["", "shows", "complex buffer"])
def test_of_a_network_without_fault_all_is_held_and_a_layer_that_nothing_uses_is_named(
    fault: str, tmp_path: Path
) -> None:
    assert [code for code, _ in start(tmp_path, model={"fault": fault})] == [0, 0]
    found = promises(tmp_path)
    assert set(found.values()) == {HELD}
    assert list(found) == ["order of rows exact", "any number of ranks", "resume exact", "any strategy", "export"]
    assert "the loss does not depend on 2 of the model's parameters, which stay as they are: spare.weight" in notices(
        tmp_path
    )


@pytest.mark.parametrize(
    ("fault", "promise", "reason"),
    [
        ({"model": {"fault": "counts"}}, "resume exact", "Tower.calls changes and is no buffer"),
        (
            {"model": {"fault": "counts outside"}},
            "resume exact",
            "the loss of the same rows is another the second time",
        ),
        ({"model": {"fault": "keeps tensors"}}, "resume exact", "Tower.kept changes and is no buffer"),
        ({"model": {"fault": "keeps in private"}}, "resume exact", "Tower._kept changes and is no buffer"),
        ({"task": {"fault": "keeps a mean"}}, "resume exact", "the loss of the same rows is another the second time"),
        ({"data": {"fault": "own generator"}}, "resume exact", "asked for twice with the same seed, is not the same"),
        (
            {"model": {"fault": "batch norm"}, "data": {"num_rows": 30}},
            "any number of ranks",
            "BatchNorm (norm) takes the statistics of a rank",
        ),
        ({"task": {"fault": "says that it mixes rows"}}, "any number of ranks", "the loss mixes the rows"),
        ({"model": {"fault": "spare first on rank 1"}}, "any strategy", "modules are called in another order"),
    ],
)
def test_what_the_parts_do_not_let_the_run_promise_is_told_with_the_reason(
    fault: dict[str, Any], promise: str, reason: str, tmp_path: Path
) -> None:
    assert [code for code, _ in start(tmp_path, **fault)] == [0, 0]
    found = promises(tmp_path)
    verdict, why = found.pop(promise)
    assert verdict == "not"
    assert reason in why
    assert set(found.values()) == {HELD}
    if "no buffer" in reason:
        assert "so it is lost when the run is resumed: register_buffer it" in notices(tmp_path)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (
            {"model": {"fault": "built by rank"}},
            2,
            "rank 1 has built other first weights than rank 0 (6 tensors",
        ),
        (
            {"model": {"fault": "buffer by rank"}},
            2,
            "rank 1 has built other first weights than rank 0 (1 tensors, such as noise",
        ),
        ({"model": {"fault": "returns an object"}}, 2, "in the SimpleNamespace that it returns no tensor is found"),
        ({"model": {"fault": "lazy"}}, 2, "spare.weight has no shape before its first forward pass"),
        ({"model": {"fault": "complex"}}, 2, "parameter phase is torch.complex64, which the optimizers do not take"),
        ({"task": {"fault": "reaches in"}}, 2, "can call the network and nothing else, and asked it for head"),
        (
            {"model": {"fault": "spare on rank 1"}},
            2,
            "such as spare.weight, for some rows, at some times or on some ranks only",
        ),
        (
            {"model": {"fault": "spare for some rows"}, "data": {"num_rows": 80}},
            2,
            "such as spare.weight, for some rows, at some times",
        ),
        ({"model": {"fault": "drops the spare"}}, 2, "such as spare.weight, for some rows, at some times"),
        ({"model": {"fault": "clamps"}}, 2, "a forward pass changes its parameter head.weight"),
        ({"model": {"fault": "raises when built"}}, 2, "raised RuntimeError: no weights today"),
        ({"task": {"fault": "mean"}}, 2, "task sum: its loss is one number, shape (); return one value a target"),
        ({"task": {"fault": "mixes rows"}}, 2, "so it depends on which rows come together"),
        ({"model": {"fault": "mixes rows"}}, 2, "say mixes_rows = True in the task"),
        ({"task": {"fault": "age"}}, 2, "forward() got an unexpected keyword argument 'age'"),
        ({"task": {"fault": "metric"}}, 2, "metric far: update of Far raised AttributeError"),
        (
            {"model": {"kind": "pair"}, "task": {"kind": "bare"}},
            2,
            "Pair does not take what task bare calls it with (",
        ),
        ({"task": {"kind": "slip"}}, 2, "task slip: has a method weigths and no weights; if weights is meant"),
        ({"task": {"weight": -1.0}}, 2, "weights of the first rows are negative or NaN"),
        ({"data": {"num_rows": 0}}, 3, "Points has not one row (its len is 0)"),
    ],
)
def test_what_no_run_could_be_made_of_is_refused_before_the_first_update(
    fault: dict[str, Any], code: int, said: str, tmp_path: Path
) -> None:
    answers = start(tmp_path, **fault)
    assert [found for found, _ in answers] == [code, code]
    assert said in answers[0][1]
    assert "Traceback" not in answers[0][1]


def test_of_a_network_that_draws_at_random_another_number_of_ranks_is_held_but_for_that(tmp_path: Path) -> None:
    assert [code for code, _ in start(tmp_path, model={"fault": "dropout"})] == [0, 0]
    found = promises(tmp_path)
    assert found.pop("any number of ranks") == (
        "held if",
        "what is drawn at random in the network, as by dropout, may be other numbers on each rank",
    )
    assert set(found.values()) == {HELD}


PADDED = {"collate": {"pad": {"x": 0}}}


@pytest.mark.parametrize("data", [{"source": "collated"}, PADDED])
def test_a_loss_that_would_count_padding_is_refused_with_what_to_write(data: dict[str, Any], tmp_path: Path) -> None:
    task = {"kind": "unweighted", "values": 2}
    ((code, said),) = start(tmp_path, ranks=1, data=data, task=task)
    assert code == 2
    assert "the loss has 2 values a row, and rows may be padded (by data.collate, or a collate" in said
    assert "add a method weights(self, batch)" in said
    assert start(tmp_path, ranks=1, data=data, task={"kind": "unweighted"})[0][0] == 0, "one value a row may do without"


def test_what_a_run_pads_is_told_before_the_first_update_where_it_cannot_be(tmp_path: Path) -> None:
    ((code, said),) = start(tmp_path, ranks=1, data={"collate": {"pad": {"xs": 0}}})
    assert code == 3
    assert "data.collate.pad.xs: rows have no such tensor (nearest: x; they have x, y, age)" in said
    ((code, said),) = start(tmp_path, ranks=1, data={"source": "collated", **PADDED})
    assert code == 2
    assert "data.collate: collated brings a method collate(rows) of its own; leave out data.collate" in said


def test_an_error_in_a_users_forward_is_told_with_his_line(tmp_path: Path) -> None:
    said = start(tmp_path, task={"fault": "age"})[0][1]
    assert f"({tmp_path / 'faulty.py'}, line " in said
    assert 'return network(batch["x"], age=batch["age"])' in said


@pytest.mark.parametrize("fault", ["spare for some rows", "drops the spare"])
def test_what_is_used_at_some_times_only_is_trained_where_nobody_waits_for_it(fault: str, tmp_path: Path) -> None:
    ((code, _),) = start(tmp_path, "run.max_steps=6", ranks=1, model={"fault": fault}, data={"num_rows": 80})
    assert code == 0
    verdict, reason = promises(tmp_path)["any strategy"]
    assert verdict == "not"
    assert reason.startswith("spare.weight is used for some rows or at some times only")
    said = notices(tmp_path)
    assert (
        "the loss depends on 2 of the model's parameters, such as spare.weight, for some rows or at some times" in said
    )
    assert "which stay as they are" not in said


def test_a_head_that_is_used_in_training_alone_is_trained(tmp_path: Path) -> None:
    assert [code for code, _ in start(tmp_path, model={"fault": "spare in training"})] == [0, 0]
    assert "does not depend on" not in notices(tmp_path)
    answers = start(tmp_path, "data.num_rows=21", "run.name=b", model={"fault": "spare in training"})
    assert [code for code, _ in answers] == [2, 2]
    said = "a micro-batch without a row, and spare.weight is used in training mode only"
    assert said in answers[0][1]


def test_a_row_that_raises_is_told_by_its_number_its_rank_and_the_line(tmp_path: Path) -> None:
    answers = start(tmp_path, ranks=1, data={"fault": "raises"})
    ((code, said),) = answers
    assert code == 3
    assert "row 11 of Points raised KeyError: 'pixels'" in said
    assert 'raise KeyError("pixels")' in said


def test_a_row_that_raises_on_another_rank_is_what_the_run_ends_with(tmp_path: Path) -> None:
    write(tmp_path, data={"fault": "raises late", "num_rows": 40})
    answers = run_ranks(2, train_main_and_listen, str(tmp_path / "run.yaml"), "run.max_steps=200", deadline_seconds=90)
    assert [code for code, _ in answers] == [3, 3]
    exit_file = json.loads((tmp_path / "runs/a/exit.json").read_bytes())
    assert exit_file["code"] == 3
    assert "raised KeyError: 'pixels'" in exit_file["reason"]
    assert "(on rank 1) (told by rank 1, which ended)" in exit_file["reason"]
    again = start(tmp_path, "run.max_steps=4", data={"fault": "raises late", "num_rows": 40})
    assert [code for code, _ in again] == [0, 0]
    assert not list((tmp_path / "runs/a").glob("failed-rank-*"))


def test_a_row_whose_loss_is_no_number_is_told_at_the_start_and_not_trained_on(tmp_path: Path) -> None:
    ((code, _),) = start(tmp_path, "run.max_steps=6", ranks=1, task={"fault": "nan"})
    assert code == 0
    assert "the loss of row 3 is nan before any update" in notices(tmp_path)


def test_weights_that_are_all_zero_end_the_run_with_the_reason(tmp_path: Path) -> None:
    ((code, said),) = start(tmp_path, "run.max_nonfinite_updates=1", ranks=1, task={"weight": 0.0})
    assert code == 6
    assert "the weights of all its targets are 0, so there is nothing to take the mean of" in said


def test_rows_that_every_update_fails_at_are_named_when_the_run_gives_up(tmp_path: Path) -> None:
    answers = start(tmp_path, "run.max_steps=40", "run.max_nonfinite_updates=1", task={"fault": "nan"})
    assert {code for code, _ in answers} == {6}
    number = json.loads((tmp_path / "runs/a/exit.json").read_bytes())["reason"]
    assert "and the loss of training row " in number


def test_looking_leaves_no_trace() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    module[2].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    with no_trace(module, torch.device("cpu")):
        module.train()
        module(torch.randn(3, 2)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert (module[0].training, module[2].training) == (True, False)


def test_a_buffer_that_a_forward_pass_has_replaced_is_put_back() -> None:
    module, mask = nn.Linear(2, 2), torch.ones(5)
    module.register_buffer("mask", mask, persistent=False)
    module.register_buffer("cache", None)
    with no_trace(module, torch.device("cpu")):
        mask.zero_()
        module.mask, module.cache = torch.zeros(2), torch.zeros(3)
    assert module.mask is mask
    assert mask.tolist() == [1.0] * 5
    assert module.cache is None


def test_promises_are_a_line_where_all_are_held_and_a_table_where_not() -> None:
    held = {"name": "resume exact", "verdict": "held", "reason": ""}
    broken = {"name": "export", "verdict": "not", "reason": "it cannot be"}
    assert list(promised([held], seconds=0.04)) == ["promises: all held (resume exact); looked at in 0.0 s"]
    assert list(promised([held, broken], seconds=2)) == [
        "promises: 1 of 2 held; looked at in 2.0 s",
        "  resume exact  held",
        "  export        not, because it cannot be",
    ]


def test_a_state_that_no_checkpoint_would_have_is_refused() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 1}

    with pytest.raises(ConfigError, match=r"0 has a state beside its parameters and buffers \(get_extra_state\)"):
        check_network(nn.Sequential(Extra(1, 1)))


def test_the_imaginary_part_of_a_buffer_stays() -> None:
    module = nn.Linear(1, 1)
    module.register_buffer("phase", torch.tensor([1 + 2j]))
    for dtype in (torch.float32, torch.float64):
        found = moved(module, torch.device("cpu"), dtype)
        assert next(found.parameters()).dtype == dtype
        assert found.get_buffer("phase").tolist() == [1 + 2j]
