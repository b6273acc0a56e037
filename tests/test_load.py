"""`harness.load`: the trained network of a run or of an export, with what is needed to use it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file

import harness
from harness import api
from harness.api import Loaded
from harness.config import use
from harness.config.io import load_config
from harness.errors import CheckpointError, ConfigError, DataError, HarnessError, StorageError
from harness.export import find_checkpoint, load_exported
from harness.export import main as export
from harness.parts import forget
from harness.rows.splits import DataSplits
from harness.sample import main as sample
from tests.distributed import test_export, test_language_runs
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import train_main
from tests.distributed.test_checkpoints import seal_trainer
from tests.helpers import write_config, write_small_table
from tests.sections import load as open_rows
from tests.tiny_models import config_values, write_language_model, write_model, write_reviews

CELL = "a_cell_of_a_notebook"
TOWER = """\
import os
import harness, torch
from torch import nn

@harness.model("tower")
class Tower(nn.Module):
    def __init__(self, features: int, classes: int, hidden: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes))
        self.register_buffer("basis", torch.randn(features, features), persistent=False)  # drawn, and in no file

    def forward(self, rows):
        logits = self.layers(rows @ self.basis)
        if "NOTE" in os.environ and not self.training:
            torch.save((rows, logits.detach()), os.environ["NOTE"])
        return logits
"""


@pytest.fixture(autouse=True)
def _what_is_registered_here_is_forgotten() -> Iterator[None]:
    yield
    use.unload()
    forget({CELL})


def a_cell(source: str) -> None:
    """Define in this process what a cell of a notebook defines."""
    exec(compile(source, "cell", "exec"), {"__name__": CELL})  # noqa: S102


def train(config: Path, *overrides: str, world_size: int = 1) -> None:
    assert run_ranks(world_size, train_main, str(config), *overrides) == [0] * world_size


def train_noting(note: str, *arguments: str) -> int:
    """Train with a network that leaves the last batch of an evaluation, and what it made of it, in a file."""
    os.environ["NOTE"] = note
    return train_main(*arguments)


def rows_of(config: Path) -> DataSplits:
    loaded = load_config(str(config)).config
    return open_rows(loaded.data, loaded.task, seed=loaded.run.seed)


def refusal(kind: type[HarnessError], path: object, **options: Any) -> str:
    """Return why something cannot be loaded."""
    with pytest.raises(kind) as caught:
        harness.load(path, **options)
    assert type(caught.value) is kind
    return str(caught.value)


def tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(network.state_dict())


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an mlp on numbers, `run`, with checkpoints at 5, 10, 15 and 20, and its export, `out`."""
    found = tmp_path_factory.mktemp("load")
    train(test_export.write_config(found, "ddp"))
    assert export([str(found / "run"), "--to", str(found / "out")]) == 0
    return found


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A run that may be spoiled."""
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a network of `my_parts.py`, `runs/a`, its export, `out`, and what it made of some rows, `note.pt`."""
    found = tmp_path_factory.mktemp("own")
    (found / "my_parts.py").write_text(TOWER)
    sections = {"run": {"name": "a", "output_root": str(found / "runs"), "max_steps": 4, "seed": 7}}
    config = write_small_table(found, name="a", use=["my_parts.py"], model={"kind": "tower"}, **sections)
    os.replace(config, found / "config.json")
    values = json.loads((found / "config.json").read_text())
    values["data"]["path"] = str(found / "rows.csv")
    config.write_text(json.dumps(values))
    assert run_ranks(1, train_noting, str(found / "note.pt"), str(config)) == [0]
    assert export([str(found / "runs/a"), "--to", str(found / "out"), "--use", str(found / "my_parts.py")]) == 0
    use.unload()
    return found


# ---------------------------------------------------------------- what is loaded


def test_a_run_is_loaded_as_its_export_is_with_what_is_known_of_it(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    of_run, of_export = harness.load(folder / "run"), harness.load(str(folder / "out"))
    assert capfd.readouterr() == ("", "")
    inputs = rows_of(folder / "run.yaml").validation.inputs.float()
    with torch.no_grad():
        wanted = load_exported(folder / "out")(inputs)
        for loaded in (of_run, of_export):
            assert isinstance(loaded, Loaded)
            assert not loaded.network.training
            assert torch.equal(loaded.network(inputs), wanted)
    described = json.loads((folder / "out/config.json").read_bytes())
    for loaded in (of_run, of_export):
        assert loaded.step == described["step"]
        assert loaded.metrics == described["metrics"] != {}
        assert loaded.preprocessing == described["preprocessing"]
        assert loaded.facts == {"input_shape": (2,), "num_outputs": 1}
        assert loaded.section.kind == "mlp"
        assert loaded.tokenizer is None
    assert of_run.config is not None
    assert of_run.config.data == load_config(str(folder / "run.yaml")).config.data
    assert of_export.config is None
    assert repr(of_run).startswith(f"<mlp of {folder}/run/checkpoints/step-000000{of_run.step}, step {of_run.step}, ")
    assert f"val/loss {of_run.metrics['val/loss']:.4g}" in repr(of_run)


@pytest.mark.parametrize(("step", "wanted"), [("latest", 20), ("5", 5), (15, 15)])
def test_the_latest_or_any_step_can_be_asked_for(folder: Path, step: str | int, wanted: int) -> None:
    loaded = harness.load(folder / "run", step=step)
    assert loaded.step == wanted
    assert equal(tensors(loaded.network), test_export.saved_model(folder / "run", wanted))
    assert bool(loaded.metrics) == (wanted == 20), "scores are of the step, or there are none"


def test_the_best_is_that_of_the_scores(copy: Path) -> None:
    best = find_checkpoint(copy, "best").name
    other = next(path for path in (copy / "checkpoints").glob("step-*") if path.name != best)
    assert harness.load(copy).path.name == best != harness.load(copy, step=int(other.name[5:])).path.name


def test_the_scores_of_the_checkpoint_are_those_of_the_network(folder: Path) -> None:
    loaded, rows = harness.load(folder / "run"), rows_of(folder / "run.yaml").validation
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(loaded.network(rows.inputs.float()), rows.targets.float())
    assert loss.item() == pytest.approx(loaded.metrics["val/loss"], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_its_outputs_are_those_of_the_run_to_the_bit_also_with_what_it_draws_and_no_file_has(
    own: Path, tmp_path: Path, precision: str
) -> None:
    note, run = own / "note.pt", own / "runs/a"
    if precision != "fp32":
        note, run = tmp_path / "note.pt", tmp_path / "a"
        arguments = (str(own / "a.yaml"), f"strategy.precision={precision}", f"run.output_root={tmp_path}")
        assert run_ranks(1, train_noting, str(note), *arguments) == [0]
    rows, wanted = torch.load(note)
    assert wanted.dtype == {"fp32": torch.float32, "fp64": torch.float64}[precision]
    files = [own / "my_parts.py"]
    networks = [harness.load(run, use=files, step="latest").network]
    networks += [harness.load(own / "out", use=files[0]).network] if precision == "fp32" else []
    with torch.no_grad():
        assert all(torch.equal(network(rows), wanted) for network in networks)


def test_of_a_run_with_ema_the_averaged_weights_are_loaded(tmp_path: Path) -> None:
    train(test_export.write_config(tmp_path, "ddp"), "ema.decay=0.9", "run.max_steps=10")
    loaded, checkpoint = harness.load(tmp_path / "run", step=10), tmp_path / "run/checkpoints/step-00000010"
    live, ema = load_file(checkpoint / "model-00000.safetensors"), load_file(checkpoint / "ema-00000.safetensors")
    averaged = {name.removeprefix("weight/"): tensor for name, tensor in ema.items() if name.startswith("weight/")}
    assert averaged
    assert equal(tensors(loaded.network), {**live, **averaged})
    assert not equal(tensors(loaded.network), live)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_checkpoint_of_two_ranks_is_loaded_on_one(strategy: str, tmp_path: Path) -> None:
    config = test_export.write_config(tmp_path, strategy)
    train(config, "run.max_steps=10", world_size=2)
    loaded, rows = harness.load(tmp_path / "run"), rows_of(config).validation
    saved: dict[str, torch.Tensor] = {}
    for file in loaded.path.glob("model-*.safetensors"):
        saved |= load_file(file)
    assert equal(tensors(loaded.network), saved)
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(loaded.network(rows.inputs.float()), rows.targets.float())
    assert loss.item() == pytest.approx(loaded.metrics["val/loss"], rel=1e-5)


def test_a_language_model_comes_with_its_tokenizer_and_writes_without_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = test_language_runs.write_config(tmp_path)
    train(config, "run.max_steps=6")
    assert export([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    of_run, of_export = harness.load(tmp_path / "run"), harness.load(tmp_path / "out")
    inputs = rows_of(config).validation.inputs[:4].long()
    with torch.no_grad():
        assert torch.equal(of_run.network(inputs), of_export.network(inputs))
    for loaded in (of_run, of_export):
        assert loaded.tokenizer is not None
        ids = loaded.tokenizer.encode(b"7 and 8 are 15")
        assert loaded.tokenizer.decode(ids) == b"7 and 8 are 15"
        assert len(ids) < 14
    with pytest.raises(ConfigError, match=r"was not trained on a table of columns; .* \[16\] each"):
        of_run.inputs([{"a": 1}])
    capsys.readouterr()
    for directory in ("run", "out"):
        assert sample([str(tmp_path / directory), "--prompt", "7 and", "--temperature", "0", "--tokens", "9"]) == 0
    of_both = capsys.readouterr().out.splitlines()
    assert of_both[: len(of_both) // 2] == of_both[len(of_both) // 2 :]


def test_a_pretrained_run_is_loaded_with_what_lora_adds_and_its_export_has_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = write_model(tmp_path / "model")
    write_reviews(tmp_path / "reviews.csv")
    sections: dict[str, Any] = {"model": {"lora": {"rank": 2}}, "run": {"max_steps": 3}}
    config = write_config(tmp_path / "tiny.yaml", config_values(tmp_path, model, **sections))
    train(config)
    assert export([str(tmp_path / "runs/tiny"), "--to", str(tmp_path / "out")]) == 0
    of_run, of_export = harness.load(tmp_path / "runs/tiny"), harness.load(tmp_path / "out")
    rows = rows_of(config).validation
    with torch.no_grad():
        logits = of_run.network(rows.inputs)
        torch.testing.assert_close(of_export.network(rows.inputs), logits, rtol=1e-5, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, rows.targets).item()
    assert loss == pytest.approx(of_run.metrics["val/loss"], rel=1e-5)
    assert of_run.preprocessing["classes"] == of_export.preprocessing["classes"] == ["great", "other"]
    assert of_run.tokenizer is of_export.tokenizer is None


@pytest.mark.slow
def test_a_pretrained_language_model_comes_with_the_tokens_of_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    texts = [f"{n} and {n + 1} are {2 * n + 1}.\n" * 9 for n in range(20)]
    write_language_model(tmp_path / "model", texts)
    (tmp_path / "all.txt").write_text("".join(texts))
    values = {
        "run": {"name": "run", "output_root": str(tmp_path), "max_steps": 2},
        "model": {"kind": "pretrained", "path": str(tmp_path / "model"), "head": "causal_lm"},
        "data": {"source": "text", "path": str(tmp_path / "all.txt"), "block": 16}
        | {"split": "tail", "global_batch": 8},
        "task": {"kind": "causal_lm"},
        "optim": {"kind": "adamw", "peak_lr": 0.001},
    }
    train(write_config(tmp_path / "run.yaml", values))
    assert export([str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    for directory in ("run", "out"):
        tokenizer = harness.load(tmp_path / directory).tokenizer
        assert tokenizer is not None
        assert tokenizer.decode(tokenizer.encode(b"7 and 8")) == b"7 and 8"
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    assert "cannot use" in refusal(ConfigError, tmp_path / "run"), "what LoRA or a head is put on is no part of a run"


# ---------------------------------------------------------------- rows of a table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a csv of numbers, of which some miss, and categories that are spelled as numbers."""
    found = tmp_path_factory.mktemp("table")
    lines = [f"{n % 9 or ''},{('01', '02', '3')[n % 3]},{n / 7:.3f},{('no', 'yes')[n % 2]}" for n in range(60)]
    (found / "rows.csv").write_text("\n".join(["age,grade,size,label", *lines]))
    values: dict[str, Any] = {
        "run": {"name": "run", "output_root": str(found), "max_steps": 2},
        "model": {"kind": "mlp", "hidden": [4]},
        "data": {"source": "csv", "path": str(found / "rows.csv"), "targets": ["label"], "categorical": ["grade"]}
        | {"impute": "median", "standardize": True, "global_batch": 8},
        "task": {"kind": "classification", "num_classes": 2},
        "optim": {"kind": "adamw", "peak_lr": 0.01},
    }
    train(write_config(found / "run.yaml", values))
    return found


def test_rows_become_the_inputs_that_the_run_made_of_them(table: Path) -> None:
    loaded, splits = harness.load(table / "run"), rows_of(table / "run.yaml")
    assert loaded.preprocessing["classes"] == ["no", "yes"]
    frame = pandas.read_csv(table / "rows.csv", dtype={"grade": str})
    inputs = loaded.inputs(frame)
    assert (inputs.shape, inputs.dtype) == ((60, 5), torch.float32)
    known = {tuple(row) for row in inputs.tolist()}
    for rows in (splits.train, splits.validation):
        assert {tuple(row) for row in rows.inputs.float().tolist()} <= known
    listed = [{"age": 3, "grade": "01", "size": 3 / 7}, {"grade": "3", "size": 2, "age": None, "other": "x"}]
    (three, two), age = loaded.inputs(listed), next(f for f in loaded.preprocessing["features"] if f["name"] == "age")
    assert three[0].item() == pytest.approx((3 - age["mean"]) / age["scale"])
    assert two[0].item() == pytest.approx((age["fill"] - age["mean"]) / age["scale"])
    assert (three[1:4].tolist(), two[1:4].tolist()) == ([1, 0, 0], [0, 0, 1])
    assert loaded.network(inputs).shape == (60, 2)


def test_a_category_that_no_training_row_had_is_a_warning(table: Path) -> None:
    loaded = harness.load(table / "run")
    with pytest.warns(UserWarning, match="'grade' has in 1 of 1 rows a value that no training row has, such as 'new'"):
        assert loaded.inputs([{"age": 3, "grade": "new", "size": 1}])[0, 1:4].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"age": 3, "grades": "01", "size": 1}], "there is no 'grade' in row 0 (nearest: 'grades')"),
        (pandas.DataFrame({"age": [3], "size": [1]}), "there is no 'grade'"),
        ([{"age": 3, "grade": "01", "size": "big"}], "column 'size' holds string, but numbers are wanted"),
        ([{"age": 3, "grade": 1, "size": 1}], "has 1 where the training rows have '01'"),
        ([{"age": 3, "grade": "01", "size": 1}, {"age": "x", "grade": "01", "size": 1}], "values of several types"),
        ([{"age": float("inf"), "grade": "01", "size": 1}], "with an infinite value"),
        ([], "are a list; a DataFrame, or a list of at least one dict, is wanted"),
        (np.zeros((2, 3)), "are a ndarray; a DataFrame, or a list"),
    ],
)
def test_rows_that_the_run_would_not_have_taken_are_refused(table: Path, rows: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        harness.load(table / "run").inputs(rows)
    assert words in str(caught.value)


# ---------------------------------------------------------------- a part of one's own


def test_a_network_of_a_file_is_loaded_with_the_file_alone(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    file = str(own / "my_parts.py")
    for path in ("runs/a", "out"):
        said = refusal(ConfigError, path)
        assert "model.kind: 'tower' is not built in; my_parts.py has brought it. Define it in this process" in said
        assert f"harness.load({path!r}, use=[{file!r}])" in said
    assert f"use=[{file!r}], step='latest')" in refusal(ConfigError, "runs/a", step="latest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = harness.load("runs/a", use="my_parts.py")
        assert harness.load("out", use=["my_parts.py"]).facts == loaded.facts
    assert loaded.facts == {"features": 2, "classes": 2, "outputs": 2, "input_shape": (2,), "num_outputs": 2}
    assert "Tower" in type(loaded.network).__name__


def test_a_network_that_is_defined_in_this_process_needs_no_file(own: Path) -> None:
    a_cell(TOWER)
    rows, wanted = torch.load(own / "note.pt")
    with torch.no_grad():
        assert torch.equal(harness.load(own / "runs/a", step="latest").network(rows), wanted)


def test_a_file_that_is_not_there_any_more_is_told_by_its_name(own: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(own / "runs/a", tmp_path / "a"))
    identity = json.loads((run / "run.json").read_text())
    identity["use"][0]["file"] = "/gone/my_parts.py"
    (run / "run.json").write_text(json.dumps(identity))
    assert f"harness.load({str(run)!r}, use=['my_parts.py'])" in refusal(ConfigError, run)


@pytest.mark.parametrize("path", ["runs/a", "out"])
def test_code_that_is_not_what_it_was_is_a_warning_at_the_line_that_loads(own: Path, path: str, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(TOWER.replace("ReLU", "GELU"))
    with pytest.warns(UserWarning, match=r"the code of my_parts.py is not what .* was trained with") as told:
        harness.load(own / path, use=tmp_path / "my_parts.py")
    assert [warning.filename for warning in told] == [__file__]


def test_load_exported_warns_as_well(own: Path, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(TOWER.replace("ReLU", "GELU"))
    with pytest.warns(UserWarning, match="the code of my_parts.py is not") as told:
        load_exported(own / "out", use=[str(tmp_path / "my_parts.py")])
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (("self.layers", "self.stack"), CheckpointError, "networks: 8 tensors are not the same, such as layers.0"),
        (("nn.Linear(features, hidden)", "nn.Linear(features, hidden, bias=False)"), CheckpointError, "layers.0.bias"),
        (("hidden: int = 8", "size: int = 8"), ConfigError, "model.hidden: unknown key"),
        (('"tower"', '"castle"'), ConfigError, "'tower' is not built in; my_parts.py has brought it"),
        (
            ("super().__init__()", "super().__init__(); 1 / 0"),
            ConfigError,
            "raised ZeroDivisionError: division by zero",
        ),
    ],
)
def test_code_of_another_network_is_refused_by_name(
    own: Path, tmp_path: Path, change: tuple[str, str], kind: type[HarnessError], words: str
) -> None:
    source = TOWER.replace(*change).replace("self.layers(", "self.stack(" if "stack" in change[1] else "self.layers(")
    (tmp_path / "my_parts.py").write_text(source.replace("hidden)", "size)") if "size" in change[1] else source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = refusal(kind, own / "runs/a", use=tmp_path / "my_parts.py")
    assert words in said


# ---------------------------------------------------------------- strangers


def test_no_code_of_a_run_directory_or_an_export_is_run(own: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for path in ("runs/a", "out"):
        stranger = Path(shutil.copytree(own / path, tmp_path / Path(path).name))
        for name in ("my_parts.py", "__init__.py", "sitecustomize.py", "torch.py"):
            (stranger / name).write_text("import pathlib; pathlib.Path(__file__).with_name('it_ran').touch()\n" + TOWER)
        monkeypatch.chdir(stranger)
        for name in (str(stranger), "."):
            assert "'tower' is not built in" in refusal(ConfigError, name)
        assert not (stranger / "it_ran").exists()


def test_a_built_in_network_is_loaded_whatever_the_stored_configuration_uses(copy: Path, monkeypatch: Any) -> None:
    (copy / "my_parts.py").write_text("raise SystemExit('it ran')")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("run:\n", "use: [my_parts.py]\nrun:\n", 1))
    monkeypatch.chdir(copy)
    assert harness.load(copy).config.use == ("my_parts.py",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_shape": None}, "input_shape: null is not a list"),
        ({"num_outputs": -1}, "num_outputs: -1 is not"),
        ({"input_shape": [2**40]}, "building the network of"),
        ({"model": {"kind": "mlp", "hidden": "many"}}, "model.hidden: "),
        ({"model": {"kind": ["mlp"]}}, "model.kind: ['mlp'] is not built in"),
        ({"use": ["my_parts.py"]}, "use.0: "),
        ({"model": None}, "model: null is not"),
    ],
)
def test_an_export_that_nobody_has_written_is_refused_by_its_field(
    folder: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    out = Path(shutil.copytree(folder / "out", tmp_path / "out"))
    described = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps({**described, **change}))
    assert words in refusal(ConfigError, out)


def test_a_damaged_export_is_an_error_of_the_harness(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "out", tmp_path / "out"))
    (out / "model.safetensors").write_bytes(b"torn")
    assert "is no file of tensors. Export the run again" in refusal(CheckpointError, out)
    save_file({"other": torch.zeros(1)}, out / "model.safetensors")
    assert "are of different networks" in refusal(CheckpointError, out)
    (out / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(ConfigError, out)
    (out / "config.json").write_text('{"model_type": "bert"}')
    assert "is not what harness export writes; is it of transformers?" in refusal(ConfigError, out)


def test_features_or_a_tokenizer_that_nobody_has_written_are_refused(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export([str(table / "run"), "--to", str(out)]) == 0
    described = json.loads((out / "config.json").read_bytes())
    for features in ([{"name": "age"}], [7], {"age": 1}, [{"name": "age", "fill": "x", "mean": 0.0, "scale": 1.0}]):
        (out / "config.json").write_text(json.dumps({**described, "preprocessing": {"features": features}}))
        with pytest.raises(DataError, match="a preprocessing that this harness has not written"):
            harness.load(out).inputs([{"age": 1}])
    (out / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be read" in refusal(CheckpointError, out)


# ---------------------------------------------------------------- what cannot be loaded says what to do


def test_a_path_that_is_neither_a_run_nor_an_export_says_what_is_wanted(folder: Path, tmp_path: Path) -> None:
    assert "is no folder, seen from" in (said := refusal(ConfigError, folder / "ruN"))
    assert f"(nearest: {folder / 'run'}); give a run directory such as runs/mnist-cnn, or a folder that" in said
    assert "is a file; give a run directory" in refusal(ConfigError, folder / "run/config.yaml")
    assert "is neither a run directory nor an export; give a run" in refusal(ConfigError, tmp_path)
    said = refusal(ConfigError, folder / "run/checkpoints/step-00000005")
    assert f"is a checkpoint; write harness.load({str(folder / 'run')!r}, step=5)" in said
    assert "is an export, which has one step; leave it out" in refusal(ConfigError, folder / "out", step=5)


@pytest.mark.parametrize("what", ["a folder of none", "no folder"])
def test_a_run_without_a_checkpoint_yet_says_when_there_will_be_one(copy: Path, what: str) -> None:
    shutil.rmtree(copy / "checkpoints")
    if what == "a folder of none":
        (copy / "checkpoints").mkdir()
    for step in ("best", "latest", 5):
        assert "has no checkpoint yet: its run saves one every" in refusal(CheckpointError, copy, step=step)


@pytest.mark.parametrize("step", ["newest", 7, -5, True])
def test_a_step_that_is_not_there_is_told_with_those_that_are(folder: Path, step: Any) -> None:
    said = refusal(CheckpointError, folder / "run", step=step)
    assert f"has no {step} checkpoint; there are steps 20, 15, 10, 5 (step=STEP)" in said


def test_a_broken_or_half_written_checkpoint_is_refused_as_by_export(copy: Path) -> None:
    path = copy / "checkpoints/step-00000010/model-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert "its SHA-256 differs. Choose another with step=STEP" in refusal(CheckpointError, copy, step=10)
    (copy / "checkpoints/step-00000005/COMMIT.json").unlink()
    assert "has no COMMIT.json: the save was cut off" in refusal(CheckpointError, copy, step=5)
    trainer = json.loads((copy / "checkpoints/step-00000015/trainer.json").read_bytes())
    seal_trainer(copy / "checkpoints/step-00000015", json.dumps({**trainer, "num_outputs": None}))
    assert "num_outputs: null is not" in refusal(CheckpointError, copy, step=15)
    (copy / "config.yaml").write_text("model: {")
    assert "start the run's command again, which writes it anew" in refusal(ConfigError, copy, step=20)


@pytest.mark.parametrize("before", ["read_checkpoint", "Saved.section", "Saved.network"])
def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_called_broken(
    copy: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    place, _, name = f"harness.api.{before}".rpartition(".")
    owner: Any = api.Saved if "Saved" in place else api
    go_on: Callable[..., Any] = getattr(owner, name)

    def delete_first(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(copy / "checkpoints/step-00000020", ignore_errors=True)
        return go_on(*arguments, **options)

    monkeypatch.setattr(owner, name, delete_first)
    if before == "read_checkpoint":
        said = refusal(CheckpointError, copy, step="latest")
        assert "was deleted by the run meanwhile. Call harness.load again" in said
    else:  # its files are open, so nothing is missed
        assert harness.load(copy, step="latest").step == 20


def test_a_folder_that_may_not_be_read_is_an_error_of_the_harness(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(api.CheckpointDirectory, "steps", refused)
    assert f"cannot read {copy}: Permission denied" in refusal(StorageError, copy)


# ---------------------------------------------------------------- what stays as it is


def test_the_random_states_and_the_settings_of_the_process_stay(own: Path) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    wanted = random.random(), np.random.rand(), torch.rand(()).item()
    source = TOWER.replace("super().__init__()", "super().__init__(); np.random.rand(); random.random()")
    a_cell(f"import random\nimport numpy as np\n{source}")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    torch.set_default_device("meta")
    try:
        network = harness.load(own / "runs/a").network
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    assert {tensor.device.type for tensor in network.buffers()} == {"cpu"}
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == wanted


def test_a_file_that_changes_afterwards_changes_no_weight(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "out", tmp_path / "out"))
    network, again = harness.load(out).network, load_exported(out)
    wanted = {name: tensor.clone() for name, tensor in tensors(network).items()}
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\x55" * 64)
    assert equal(tensors(network), wanted)
    assert equal(tensors(again), wanted)


def test_a_script_that_loads_imports_no_engine(folder: Path) -> None:
    program = (
        f"import harness, sys; harness.load({str(folder / 'run')!r}); "
        "print(*{'accelerate', 'deepspeed', 'transformers', 'wandb', 'matplotlib'} & set(sys.modules), end='')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
