"""`harness selftest`: what a run promises is tried, and a part that breaks it unseen at the start is found."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.checkpoint.tensors import write_tensors
from harness.config import use
from harness.config.checks import phase_problems
from harness.config.io import dump_config, load_config, load_stored
from harness.config.use import NOTHING_USED
from harness.doctor.differences import compare
from harness.errors import ConfigError, StorageError
from harness.launch import cli
from harness.launch import selftest as tested
from harness.launch.plan import Machine
from harness.launch.selftest import UPDATES, Check, Selftest, Way, copy_as_killed, shortened, ways_of
from tests.distributed.scenarios import Spec, assemble_spec
from tests.helpers import write_small_table
from tests.neighbours import REPOSITORY

TWO_TOWERS = REPOSITORY / "examples/two_towers"
CPUS = Machine(num_gpus=0, num_cores=2)
PARTS = """\
import os
from torch import nn
import harness

BACKWARDS = []


class Towers(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.document = nn.Linear(16, width), nn.Linear(16, width)

    def forward(self, query, document):
        return (self.query(query) * self.document(document)).sum(dim=-1) * self.factor()


@harness.model("counting")
class Counting(Towers):
    # Its outputs depend on how many backward passes this process has made, and on the rank.

    def forward(self, query, document):
        found = super().forward(query, document)
        if found.requires_grad:
            found.register_hook(lambda gradient: BACKWARDS.append(1))
        return found

    def factor(self):
        return 1 + 0.1 * len(BACKWARDS) + 0.1 * int(os.environ["RANK"])
"""

Told = tuple[int, list[str]]


@pytest.fixture
def selftest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Told]]:
    """Run the command on CPUs, and return its exit code and lines; its temporary folder is below `tmp_path`."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(*arguments: str | Path) -> Told:
        code = cli.main(["selftest", *map(str, arguments)])
        return code, capsys.readouterr().out.splitlines()

    yield run
    use._LOADER.drop(list(use._LOADER.files))


@pytest.fixture
def two_towers(tmp_path: Path) -> Path:
    """The example, with a file of networks that break a promise beside it."""
    shutil.copytree(TWO_TOWERS, tmp_path / "towers")
    (tmp_path / "towers" / "breaking.py").write_text(PARTS)
    text = (TWO_TOWERS / "run.yaml").read_text().replace("use: [two_towers.py]", "use: [two_towers.py, breaking.py]")
    (tmp_path / "towers" / "run.yaml").write_text(text)
    return tmp_path / "towers" / "run.yaml"


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "temporary").glob("selftest-*"))


# ---------------------------------------------------------------- whole commands


@pytest.mark.long
def test_an_example_keeps_what_it_promises_on_one_rank_and_on_two(
    selftest: Callable[..., Told], tmp_path: Path
) -> None:
    code, lines = selftest(TWO_TOWERS / "run.yaml")
    assert code == 0
    assert lines[0] == "trains 3 updates each of ddp on 1 rank, ddp on 2 ranks, with schedule.total_steps=1000"
    assert [line[:13].strip() for line in lines[1:-1]] == ["held"] * 4
    same, killed, ranks, killed_on_two = (line[13:].partition(": ") for line in lines[1:-1])
    assert [same[0], killed[0], ranks[0], killed_on_two[0]] == [
        "the same again, ddp on 1 rank",
        "ddp on 1 rank, killed after update 1 and resumed",
        "ddp on 2 ranks as ddp on 1 rank",
        "ddp on 2 ranks, killed after update 1 and resumed",
    ]
    for text in (same[2], killed[2], killed_on_two[2]):
        assert text.startswith("3 updates, 1 evaluation, ")
        assert text.endswith("the same bits")
    assert "4 tensors, at most " in ranks[2]
    assert lines[-1].startswith("All that this run promises is held (4 checks, ")
    assert kept(tmp_path) == []


@pytest.mark.slow
def test_a_network_that_counts_backwards_and_asks_for_its_rank_is_found_where_either_breaks_a_promise(
    selftest: Callable[..., Told], two_towers: Path, tmp_path: Path
) -> None:
    code, lines = selftest(two_towers, "model.kind=counting", "model.width=8")
    assert code == 1
    _, same, killed, ranks, killed_on_two, last = lines
    assert same.startswith("held         the same again, ddp on 1 rank: ")
    # On one rank only the count is another, which a new process begins anew; the same rows on two ranks are only
    # multiplied by what the second has.
    assert killed.startswith("DIFFERS      ddp on 1 rank, killed after update 1 and resumed: loss of update 2: ")
    assert ranks.startswith("DIFFERS      ddp on 2 ranks as ddp on 1 rank: loss of update 1: ")
    assert "allowed 1e-04" in ranks
    assert killed_on_two.startswith(
        "DIFFERS      ddp on 2 ranks, killed after update 1 and resumed: loss of update 2: "
    )
    assert last.startswith("Not held: resume exact, any number of ranks (3 of 4 checks, ")
    (folder,) = kept(tmp_path)
    assert last.endswith(f"The runs are kept in {folder}")
    promises = json.loads((folder / "whole/ddp-2/run.json").read_text())["promises"]
    assert {promise["verdict"] for promise in promises} == {"held"}, "the start has seen it, so this tries nothing"


@pytest.mark.slow
def test_a_training_that_cannot_start_ends_with_its_code_and_its_last_lines(
    selftest: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_small_table(tmp_path, name="a")
    (tmp_path / "rows.csv").write_text("a,b,y\n1,2\n")
    told: list[str] = []
    monkeypatch.setattr(tested, "print", lambda *texts, **_: told.extend(texts), raising=False)
    assert selftest(path)[0] == 3
    (place,) = [index for index, text in enumerate(told) if text.startswith("FAILED")]
    assert told[place] == "FAILED       ddp on 1 rank: exit code 3"
    assert any("rows.csv" in text for text in told[place + 1 :])
    assert kept(tmp_path) == []


# ---------------------------------------------------------------- what is trained


def test_fewer_gpus_than_ranks_are_told_with_what_to_type(tmp_path: Path) -> None:
    path = write_small_table(tmp_path, name="a")
    with pytest.raises(ConfigError, match="this machine has 3 visible to CUDA; type --ranks 1,2,3, or put CUDA_VIS"):
        ways_of(str(path), [], (), (1, 2, 4), machine=Machine(num_gpus=3, num_cores=2))
    assert len(ways_of(str(path), [], (), (1, 2, 4), machine=Machine(num_gpus=4, num_cores=2))) == 3


def test_each_strategy_is_tried_on_each_number_of_ranks(tmp_path: Path) -> None:
    path = write_small_table(tmp_path, name="a", strategy={"kind": "zero1", "multi_rank_buckets": True})
    ways = ways_of(str(path), [], ("zero1", "ddp"), (1, 2), machine=CPUS)
    assert [(way.strategy, way.ranks) for way in ways] == [("zero1", 1), ("zero1", 2), ("ddp", 1), ("ddp", 2)]
    assert all(way.loaded.config.strategy.kind == way.strategy for way in ways)
    assert [way.strategy for way in ways_of(str(path), [], (), (2,), machine=CPUS)] == ["zero1"]
    assert ways[0].loaded.used == NOTHING_USED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "zero4"], "'zero4' is not one of ddp, zero1, zero2, zero3"),
        (["--ranks", "1,0"], "'0' is not a whole number of at least 1"),
        (["--ranks", "3"], "data.global_batch: 8 does not divide over 3 ranks"),
    ],
)
def test_what_cannot_be_tried_ends_with_2_before_anything_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["selftest", str(write_small_table(tmp_path, name="a")), *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_a_shortened_configuration_is_one_that_a_run_takes(path: Path, tmp_path: Path) -> None:
    config = load_config(path).config
    short, _ = shortened(config)
    (tmp_path / "a.yaml").write_text(dump_config(short))
    assert load_stored(tmp_path / "a.yaml") == short
    assert phase_problems(short.schedule, total_updates=UPDATES) == []
    same = ("model", "data", "task", "optim", "clip", "gradient_noise", "ema")
    assert [getattr(short, name) for name in same] == [getattr(config, name) for name in same]


@pytest.mark.parametrize(
    ("schedule", "run", "changed", "change"),
    [
        ({"kind": "constant"}, {}, {}, ""),
        ({"kind": "constant", "warmup_steps": 3}, {}, {}, ""),
        ({"kind": "plateau", "warmup_steps": 9}, {}, {"warmup_steps": 3}, "schedule.warmup_steps=3 instead of 9"),
        ({"kind": "cosine", "warmup_steps": 9}, {}, {"total_steps": 1000}, "schedule.total_steps=1000"),
        ({"kind": "linear"}, {"max_steps": 70}, {"total_steps": 70}, "schedule.total_steps=70"),
        ({"kind": "linear", "total_steps": 50, "warmup_steps": 20}, {}, {}, ""),
        ({"kind": "wsd", "decay_steps": 4000}, {}, {"total_steps": 4000}, "schedule.total_steps=4000"),
    ],
)
def test_a_schedule_keeps_its_first_rates_where_it_can(
    tmp_path: Path, schedule: dict[str, Any], run: dict[str, Any], changed: dict[str, Any], change: str
) -> None:
    budget = run or {"max_epochs": 2}
    config = load_config(write_small_table(tmp_path, name="a", schedule=schedule, run={"name": "a", **budget})).config
    short, said = shortened(config)
    assert short.schedule == config.schedule.model_copy(update=changed)
    assert said == change
    assert (short.run.max_steps, short.run.max_epochs) == (UPDATES, None)


# ---------------------------------------------------------------- what is compared


def write_run(folder: Path, *, weights: list[float], losses: list[float], accuracy: float = 0.5) -> Path:
    """Write what is compared of a run of three updates; weights begin at 1, and end at `weights`."""
    (folder / "checkpoints").mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"event": "update", "step": step, "loss": loss, "seconds": float(len(folder.name))}
        for step, loss in enumerate(losses, start=1)
    ]
    sizes = [len("".join(json.dumps(line) + "\n" for line in lines[:count])) for count in (1, 2, 3)]
    lines.append({"event": "evaluation", "step": 3, "metrics": {"val/loss": 2.0, "val/accuracy": accuracy}})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text('{"event": "started", "precision": "fp32", "device": "cpu"}\n')
    ends = (torch.ones(2), torch.ones(2), torch.tensor(weights))
    for step, (size, end) in enumerate(zip(sizes, ends, strict=True), start=1):
        save = folder / f"checkpoints/step-{step:08d}"
        save.mkdir()
        tensors: dict[str, Tensor] = {"w": end, "seen": torch.tensor(step)}
        write_tensors(save / "model-00000.safetensors", tensors)
        write_tensors(save / "optim-00000.safetensors", {"w/step": torch.tensor(float(step))})
        write_tensors(save / "rng-00000.safetensors", {"torch": torch.arange(9)})
        (save / "trainer.json").write_text(json.dumps({"ledger_bytes": size, "optimizer": [{"parameters": ["w"]}]}))
        (save / "COMMIT.json").write_text("{}")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_run(tmp_path / "base", weights=[1.1, 0.9], losses=[3.0, 2.0, 1.0])


def test_equal_runs_are_equal_whatever_a_clock_says(base: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", weights=[1.1, 0.9], losses=[3.0, 2.0, 1.0])
    for to_the_bit, num_tensors in ((True, 4), (False, 2)):
        found = compare(base, other, to_the_bit=to_the_bit)
        assert (found.difference, found.largest) == (None, "")
        assert found.compared == f"3 updates, 1 evaluation, {num_tensors} tensors"


@pytest.mark.parametrize(
    ("changes", "is_rounding", "where"),
    [
        ({"losses": [3.0, 2.0001, 1.0]}, True, "loss of update 2: 2 and 2.0001 (5.0e-05 apart)"),
        ({"losses": [3.0, 2.001, 1.0]}, False, "loss of update 2: 2 and 2.001 (5.0e-04 apart)"),
        ({"losses": [3.0, 2.0]}, False, "number of lines: 4 and 3"),
        ({"accuracy": 0.505}, True, "val/accuracy of evaluation at update 3: 0.5 and 0.505"),
        ({"accuracy": 0.52}, False, "val/accuracy of evaluation at update 3: 0.5 and 0.52"),
        ({"weights": [1.101, 0.9]}, True, "model/w: 1 of 2 elements have other bits (9.1e-04 apart)"),
        ({"weights": [1.11, 0.9]}, False, "model/w: 1 of 2 elements have other bits (9.1e-03 apart)"),
    ],
)
def test_what_is_no_rounding_differs_and_the_first_place_is_named(
    base: Path, tmp_path: Path, changes: dict[str, Any], is_rounding: bool, where: str
) -> None:
    values: dict[str, Any] = {"weights": [1.1, 0.9], "losses": [3.0, 2.0, 1.0], **changes}
    if len(values["losses"]) == 2:
        other = write_run(tmp_path / "other", weights=[1.1, 0.9], losses=[3.0, 2.0, 1.0])
        lines = (other / "ledger.jsonl").read_text().splitlines()
        (other / "ledger.jsonl").write_text("\n".join([*lines[:2], lines[3]]) + "\n")
    else:
        other = write_run(tmp_path / "other", **values)
    exact = compare(base, other, to_the_bit=True).difference
    assert exact is not None
    assert exact.startswith(where)
    rounded = compare(base, other, to_the_bit=False)
    assert (rounded.difference is None) == is_rounding
    assert rounded.largest


def test_weights_are_as_far_apart_as_is_their_distance_beside_the_way_that_they_went(
    base: Path, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", weights=[1.11, 0.9], losses=[3.0, 2.0, 1.0])
    apart = 0.01 / (0.1**2 + 0.1**2) ** 0.5
    difference = compare(base, other, to_the_bit=False).difference
    assert difference is not None
    assert difference.startswith("weights, most w: ")
    assert f"({apart:.1e} apart, allowed 2e-02)" in difference


def test_another_random_state_is_another_run_to_the_bit_alone(base: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", weights=[1.1, 0.9], losses=[3.0, 2.0, 1.0])
    write_tensors(other / "checkpoints/step-00000003/rng-00000.safetensors", {"torch": torch.arange(9) + 1})
    difference = compare(base, other, to_the_bit=True).difference
    assert difference is not None
    assert difference.startswith("random state torch of rank 0: 9 of 9 elements have other bits")
    assert compare(base, other, to_the_bit=False).difference is None


def test_a_kill_after_the_first_save_leaves_that_and_the_ledger_up_to_it(base: Path, tmp_path: Path) -> None:
    (base / "exit.json").write_text("{}")
    (base / "checkpoints/LATEST").write_text("{}")
    copy_as_killed(base, tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed/checkpoints").iterdir()] == ["step-00000001"]
    assert [json.loads(line)["step"] for line in (tmp_path / "killed/ledger.jsonl").read_text().splitlines()] == [1]
    assert not (tmp_path / "killed/exit.json").exists()
    assert len(list(base.glob("checkpoints/step-*"))) == 3


@pytest.mark.parametrize(("network", "verdict"), [("gpt", "held"), ("gpt_dropout", "held if")])
def test_a_network_that_draws_promises_any_number_of_ranks_on_a_condition(network: str, verdict: str) -> None:
    promises = {promise.name: promise for promise in assemble_spec(Spec(network=network)).promises}
    assert promises["any number of ranks"].verdict == verdict
    assert ("dropout" in promises["any number of ranks"].reason) == (verdict == "held if")


def test_what_is_promised_on_a_condition_breaks_no_promise(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", weights=[1.1, 0.9], losses=[3.1, 2.0, 1.0])
    unlike = Check("2 ranks as 1", tested.RANKS, base, other, excuse="nothing is drawn")
    assert Selftest([], checks=[unlike])._tell() == []
    assert capsys.readouterr().out.startswith(
        "held if      2 ranks as 1: nothing is drawn; loss of update 1: 3 and 3.1"
    )
    strict = Check("2 ranks as 1", tested.RANKS, base, other)
    assert Selftest([], checks=[strict])._tell() == [strict]
    assert capsys.readouterr().out.startswith("DIFFERS      2 ranks as 1: loss of update 1: 3 and 3.1 (3.2e-02 apart")


# ---------------------------------------------------------------- what follows from what


class Pretended(Selftest):
    """Writes in an instant what a training would, unless it is to fail; notes what was trained."""

    promises: Mapping[str, tuple[str, str]] = {}
    codes: Mapping[str, int] = {}

    def _launch(self, way: Way, root: str) -> int:
        trained = f"{root} {way.name}"
        self.trained = [*getattr(self, "trained", []), trained]
        self._log(way, root).write_text("nothing\nwent well\n")
        if code := self.codes.get(trained):
            return code
        folder = self._directory(way, root)
        shutil.rmtree(folder, ignore_errors=True)
        write_run(folder, weights=[1.1, 0.9], losses=[3.0, 2.0, 1.0])
        told = [
            dict(zip(("name", "verdict", "reason"), (name, *self.promises.get(name, ("held", ""))), strict=True))
            for name in (tested.RANKS, tested.RESUME, tested.STRATEGY)
        ]
        (folder / "run.json").write_text(json.dumps({"schema": 1, "id": "0123abcd", "promises": told}))
        return 0


def compared_here(checks: Sequence[Check]) -> Iterator[dict[str, Any]]:
    for check in checks:
        assert check.base
        assert check.other
        yield asdict(compare(check.base, check.other, to_the_bit=check.to_the_bit))


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(tested, "_compared", compared_here)  # without a process that imports torch
    path = write_small_table(tmp_path, name="a")
    return Pretended(ways_of(str(path), [], ("ddp", "zero3"), (1, 2), machine=CPUS))


def outcomes(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {line[13:].partition(": ")[0]: line[:13].strip() for line in lines[1:-1] if line[0] != " "}


ALL_TITLES = [
    "the same again, ddp on 1 rank",
    "ddp on 1 rank, killed after update 1 and resumed",
    "ddp on 2 ranks as ddp on 1 rank",
    "ddp on 2 ranks, killed after update 1 and resumed",
    "zero3 on 1 rank as ddp on 1 rank",
    "zero3 on 1 rank, killed after update 1 and resumed",
    "zero3 on 2 ranks as ddp on 2 ranks",
    "zero3 on 2 ranks, killed after update 1 and resumed",
    "zero3 on 2 ranks goes on from a checkpoint of ddp",
]


def test_every_promise_is_tried_in_every_way(pretended: Pretended, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretended.run() == 0
    assert outcomes(capsys) == dict.fromkeys(ALL_TITLES, "held")
    assert not pretended.folder.exists()


def test_what_is_not_promised_is_told_and_breaks_nothing(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended.promises = {tested.RANKS: ("not", "BatchNorm"), tested.STRATEGY: ("not", "ddp only")}
    assert pretended.run() == 0
    found = outcomes(capsys)
    assert [title for title, outcome in found.items() if outcome == "not promised"] == [
        ALL_TITLES[2],
        ALL_TITLES[4],
        ALL_TITLES[6],
    ]
    assert not [trained for trained in pretended.trained if "zero3" in trained]


def test_where_no_resume_is_promised_none_is_tried(pretended: Pretended, capsys: pytest.CaptureFixture[str]) -> None:
    pretended.promises = {tested.RESUME: ("not", "calls")}
    assert pretended.run() == 0
    assert [title for title, outcome in outcomes(capsys).items() if outcome == "not promised"] == ALL_TITLES[1:8:2]
    assert not [trained for trained in pretended.trained if "killed" in trained]


def test_a_training_that_fails_is_told_with_its_last_lines_and_the_others_go_on(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended.codes = {"whole zero3-2": 7}
    assert pretended.run() == 1
    out = capsys.readouterr().out
    assert "FAILED       zero3 on 2 ranks as ddp on 2 ranks: exit code 7\n  nothing\n  went well\n" in out
    assert out.count("held  ") == 6
    assert "\nNot held: any strategy (1 of 7 checks, " in out
    assert out.endswith(f" s). The runs are kept in {pretended.folder}\n")
    assert (pretended.folder / "whole/ddp-1").is_dir()


def test_a_full_disk_is_no_broken_promise(pretended: Pretended) -> None:
    pretended.codes = {"killed ddp-1": 5}
    with pytest.raises(StorageError, match="went well"):
        pretended.run()
    assert not pretended.folder.exists()


def test_the_first_training_decides_what_is_wrong_with_the_configuration(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended.codes = {"whole ddp-1": 3}
    assert pretended.run() == 3
    assert "FAILED       ddp on 1 rank: exit code 3\n  nothing\n  went well\n" in capsys.readouterr().err
    assert pretended.trained == ["whole ddp-1"]
    assert not pretended.folder.exists()
