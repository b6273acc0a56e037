"""The door: what is registered under a kind, which keys it has, and what is said of wrong ones."""

from __future__ import annotations

import functools
import importlib
import json
import pickle
import pkgutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from inspect import isfunction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import nn

import harness
import harness.catalogue
from harness.config.data import DataSection
from harness.config.fields import PositiveInt, Section
from harness.config.io import load_config
from harness.config.run_config import RunConfig
from harness.config.slots import ModelSection, TaskSection
from harness.errors import ConfigError, DataError
from harness.parts import forget, registered
from harness.rows.splits import DataSplits
from tests.sections import parsed

DOOR = ("model", "data", "task", "tracker")
BASE: dict[str, Any] = {
    "run": {"name": "a", "max_steps": 1},
    "model": {"kind": "mlp", "hidden": [4]},
    "data": {"source": "csv", "path": "rows.csv", "targets": ["y"], "global_batch": 4},
    "task": {"kind": "classification", "num_classes": 2},
    "optim": {"kind": "adam", "peak_lr": 0.1},
}


@pytest.fixture(autouse=True)
def _what_is_registered_here_is_forgotten() -> Iterator[None]:
    yield
    forget({__name__})


def problems(tmp_path: Path, **sections: Any) -> list[str]:
    """Return what is wrong with a configuration, a line each."""
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({**BASE, **sections}))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return [line.strip() for line in str(caught.value).split("\n")[1:]]


def refusal(register: Callable[[], object]) -> str:
    """Return why something cannot be registered, without the line of this file."""
    with pytest.raises(ConfigError) as caught:
        register()
    origin, _, text = str(caught.value).removeprefix("ConfigError: ").partition(": ")
    assert origin.startswith("test_parts.py line "), origin
    return text


# ---------------------------------------------------------------- the names of the package


def test_the_decorators_are_names_of_the_package_whatever_is_imported() -> None:
    for module in pkgutil.walk_packages(harness.__path__, "harness."):
        if not module.name.endswith("__main__") and ".launch" not in module.name:
            importlib.import_module(module.name)
    for name in DOOR:
        assert callable(getattr(harness, name)("a-name")), f"a module called harness.{name} would take its place"
    for name in harness.CALLS:
        assert isfunction(getattr(harness, name)), f"a module called harness.{name} would take its place"
    assert {*DOOR, *harness.CALLS} <= set(dir(harness)), "a notebook completes them"


def test_importing_the_package_imports_neither_pydantic_nor_torch() -> None:
    program = "import harness, sys; sys.exit(bool({'pydantic', 'torch', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_name_that_the_package_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="modle"):
        harness.modle  # noqa: B018


# ---------------------------------------------------------------- the catalogue comes in by the same door


def test_one_new_kind_is_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "newcomer"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "section.py").write_text(
        "from typing import Literal\n"
        "from harness.config.slots import ModelSection\n"
        "from harness.parts import model\n"
        "@model('newcomer')\n"
        "class NewcomerModel(ModelSection):\n"
        "    kind: Literal['newcomer']\n"
        "    size: int = 3\n"
        "    def build(self, facts):\n"
        "        return facts['num_outputs']\n"
        "    def problems(self, config):\n"
        "        return ['model.size: too small'] if self.size < 1 else []\n"
    )
    monkeypatch.setattr(harness.catalogue, "__path__", [*harness.catalogue.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = "harness.catalogue.newcomer.section"
    try:
        found = RunConfig.model_validate({**BASE, "model": {"kind": "newcomer"}})
        assert found.model.model_dump() == {"kind": "newcomer", "size": 3}
        assert found.model.is_ours
        assert found.model.build({"num_outputs": 7}) == 7
        assert problems(tmp_path, model={"kind": "newcomer", "size": 0}) == ["model.size: too small"]
        assert "newcomer" in problems(tmp_path, model={"kind": "nwecomer"})[0]
        assert registered().of("model")["newcomer"].origin == "built in"
    finally:
        forget({name})
        for module in (name, "harness.catalogue.newcomer"):
            sys.modules.pop(module, None)
        vars(harness.catalogue).pop("newcomer", None)


# ---------------------------------------------------------------- keys from a signature


class Pair(NamedTuple):
    """A type of this file, which annotations name."""

    left: int
    right: int


def register_tower() -> type[nn.Module]:
    @harness.model("tower")
    class Tower(nn.Module):
        """Two towers."""

        def __init__(  # noqa: PLR0917  # as people write them
            self,
            channels: int,
            classes: int,
            width: int,
            act: Literal["relu", "gelu"] = "relu",
            sizes: tuple[int, ...] = (1, 2),
            rate: float | None = None,
            bias: bool = True,
            named: dict[str, list[float]] | None = None,
            several: int | str = 1,
            anything=None,  # type: ignore[no-untyped-def]
            norm: Callable[..., nn.Module] = nn.BatchNorm2d,
            **rest: Any,
        ) -> None:
            super().__init__()
            self.given = (channels, classes, width, act, sizes, rate, bias, named, several, anything, norm)
            self.layer = nn.Linear(channels, classes)

    return Tower


def test_the_parameters_are_the_keys_with_their_types_and_defaults() -> None:
    register_tower()
    section = parsed("model", {"kind": "tower", "width": 3, "sizes": [4], "rate": 1, "named": {"a": [1, 2.5]}})
    assert section.model_dump(mode="json") == {
        "kind": "tower",
        "channels": None,
        "classes": None,
        "width": 3,
        "act": "relu",
        "sizes": [4],
        "rate": 1.0,
        "bias": True,
        "named": {"a": [1.0, 2.5]},
        "several": 1,
        "anything": None,
    }
    network = section.build({"channels": 2, "classes": 5, "width": 3, "input_shape": (2,), "num_outputs": 5})
    assert network.given == (2, 5, 3, "relu", (4,), 1.0, True, {"a": [1.0, 2.5]}, 1, None, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({"width": "3"}, ["model.width: '3' is not a whole number, or null"]),
        ({"width": True}, ["model.width: true is not a whole number, or null"]),
        ({"width": 1, "bias": 1}, ["model.bias: 1 is not true or false"]),
        ({"width": 1, "rate": "a"}, ["model.rate: 'a' is not a finite number, or null"]),
        ({"width": 1, "rate": True}, ["model.rate: true is not a finite number, or null"]),
        ({"width": 1, "act": "rleu"}, ["model.act: 'rleu' is not one of relu, gelu (nearest: relu)"]),
        ({"width": 1, "sizes": [1, "a"]}, ["model.sizes.1: 'a' is not a whole number"]),
        ({"width": 1, "sizes": 3}, ["model.sizes: 3 is not a list, each a whole number"]),
        ({"width": 1, "several": [1]}, ["model.several: [1] is not a whole number, or a text"]),
        ({"width": 1, "named": {"a": ["x"]}}, ["model.named.a.0: 'x' is not a finite number"]),
        (
            {"wdith": 1},
            [
                "model.wdith: unknown key (nearest: width; allowed: kind, channels, classes, width, act, sizes, rate, "
                "bias, named, several, anything)"
            ],
        ),
    ],
)
def test_a_wrong_value_is_told_as_those_of_our_own_kinds(
    tmp_path: Path, keys: dict[str, Any], lines: list[str]
) -> None:
    register_tower()
    assert problems(tmp_path, model={"kind": "tower", **keys}) == lines


def test_a_missing_key_is_told_with_what_it_takes(tmp_path: Path) -> None:
    @harness.model("tower")
    def tower(depth: int, anything):  # type: ignore[no-untyped-def]
        return nn.Linear(depth, 1)

    assert problems(tmp_path, model={"kind": "tower"}) == [
        "model.depth: missing; wanted: a whole number",
        "model.anything: missing; wanted: a value",
    ]


def test_an_unknown_kind_is_told_with_the_nearest_and_where_kinds_come_from(tmp_path: Path) -> None:
    register_tower()
    (line,) = problems(tmp_path, model={"kind": "towr"})
    assert line.startswith("model.kind: 'towr' is not one of cnn, gpt, mlp, perceptron, pretrained, tower (nearest: ")
    assert "(nearest: tower; built in: cnn, gpt, mlp, perceptron, pretrained; test_parts.py line " in line


def test_annotations_may_be_texts_and_name_types_of_the_file() -> None:
    @harness.model("tower")
    def tower(pair: Pair, other: Pair | None = None) -> nn.Module:
        return nn.Linear(pair.left, pair.right)

    network = parsed("model", {"kind": "tower", "pair": [2, 3]}).build({})
    assert network.weight.shape == (3, 2)


def test_an_annotation_that_cannot_be_understood_is_refused_by_its_name() -> None:
    def tower(depth: Unknown = 1) -> nn.Module:  # type: ignore[name-defined]  # noqa: F821
        raise NotImplementedError

    assert refusal(lambda: harness.model("tower")(tower)).endswith(
        "tower: the annotation of parameter 'depth', Unknown, cannot be understood (name 'Unknown' is not defined); "
        "import what it names (not under TYPE_CHECKING), or leave it out"
    )


# ---------------------------------------------------------------- what cannot be registered


def _with_reserved(name: str) -> Callable[..., Any]:
    namespace: dict[str, Any] = {}
    exec(f"def part({name}): ...", namespace)  # noqa: S102
    made: Callable[..., Any] = namespace["part"]
    return made


@pytest.mark.parametrize(
    ("slot", "name", "text"),
    [
        ("model", "kind", "has a parameter 'kind', which is a key that every model has; rename it"),
        ("task", "kind", "has a parameter 'kind', which is a key that every task has; rename it"),
        *(
            ("data", name, f"has a parameter {name!r}, which is a key that every data has; rename it")
            for name in (
                *("source", "global_batch", "workers", "collate", "lanes", "validation_fraction", "sampling"),
                "stratify",
            )
        ),
        ("model", "build", "has a parameter 'build', which sections use themselves; rename it"),
        ("model", "x, /", "parameter 'x' takes no name (it stands before /), and keys are names"),
        ("model", "_x", "has a parameter '_x', and keys do not begin with _; rename it"),
    ],
)
def test_a_parameter_that_cannot_be_a_key_is_refused(slot: str, name: str, text: str) -> None:
    assert refusal(lambda: getattr(harness, slot)("mine")(_with_reserved(name))) == f"part: {text}"


def test_a_type_that_yaml_cannot_say_is_refused_unless_it_has_a_default() -> None:
    def tower(device: torch.device) -> nn.Module:
        raise NotImplementedError

    text = refusal(lambda: harness.model("tower")(tower))
    assert text.endswith(
        "parameter 'device' is a torch.device, which YAML cannot say; give it a default, or take a text and look it up"
    )


def test_what_cannot_be_built_again_is_refused_and_a_lambda_is_fine() -> None:
    assert refusal(lambda: harness.model("tower")(nn.Linear(1, 1))) == (
        "Linear: is an object, of which a run can make no second one; put the decorator over its class, or over a "
        "function that returns it"
    )
    harness.model("small")(lambda width=2: nn.Linear(width, 1))
    assert parsed("model", {"kind": "small"}).build({}).in_features == 2
    harness.model("partial")(functools.partial(nn.Linear, out_features=3))
    assert parsed("model", {"kind": "partial", "in_features": 2}).build({}).out_features == 3


def test_a_name_of_ours_is_taken_and_two_of_one_name_are_told_with_both_places() -> None:
    with pytest.raises(ConfigError, match=r"test_parts.py line \d+: the model 'mlp' is built in; choose another name"):
        harness.model("mlp")(lambda: nn.Linear(1, 1))
    harness.model("twice")(lambda: nn.Linear(1, 1))
    two = r"two parts for model 'twice': test_parts.py line \d+ and test_parts.py line \d+; rename one of them"
    with pytest.raises(ConfigError, match=two):
        harness.model("twice")(lambda: nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ["", "a b", "1st", "a/b"])
def test_a_kind_is_one_word(kind: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a model"):
        harness.model(kind)


def test_a_decorator_without_brackets_says_how_it_is_written() -> None:
    with pytest.raises(ConfigError, match=r'write @harness.model\("NAME"\) with a name in brackets'):
        harness.model(lambda: nn.Linear(1, 1))  # type: ignore[arg-type]


# ---------------------------------------------------------------- sections of a user


def test_a_section_is_registered_with_its_kind_among_its_keys(tmp_path: Path) -> None:
    @harness.model("unet")
    class UNet(Section):
        depth: PositiveInt = 4

        def build(self, facts: Any) -> nn.Module:
            return nn.Linear(facts["channels"], self.depth)

    section = parsed("model", {"kind": "unet", "depth": 2})
    assert isinstance(section, UNet)
    assert isinstance(section, ModelSection)
    assert section.build({"channels": 3}).weight.shape == (2, 3)
    assert problems(tmp_path, model={"kind": "unet", "depth": 0}) == [
        "model.depth: 0 is not a whole number, at least 1"
    ]


def test_a_section_without_what_makes_the_thing_is_refused() -> None:
    class Empty(Section):
        depth: int = 1

    assert refusal(lambda: harness.model("empty")(Empty)).endswith(
        "is a section without build(), which makes the model"
    )
    assert refusal(lambda: harness.data("empty")(Empty)).endswith("is a section without open(), which makes the data")


def test_a_configuration_with_parts_is_equal_to_its_copy_and_survives_pickling() -> None:
    register_tower()
    config = RunConfig.model_validate({**BASE, "model": {"kind": "tower", "width": 3}})
    assert RunConfig.model_validate(config.model_dump()) == config
    copy = pickle.loads(pickle.dumps(config))  # noqa: S301
    assert copy == config
    assert type(copy.model) is type(config.model)
    assert config.model_copy(deep=True) == config


# ---------------------------------------------------------------- facts of the data


def test_a_parameter_without_a_default_that_bears_the_name_of_a_fact_takes_it() -> None:
    register_tower()
    section = parsed("model", {"kind": "tower", "width": 3})
    taken, said = section.with_facts({"channels": 2, "classes": 5, "width": 3})
    assert (taken.channels, taken.classes) == (2, 5)
    assert said == ["model.channels: 2, from the data", "model.classes: 5, from the data"]
    assert taken.with_facts({"channels": 2, "classes": 5, "width": 3}) == (taken, [])


@pytest.mark.parametrize(
    ("keys", "facts", "text"),
    [
        (
            {"width": 3, "channels": 4},
            {"channels": 2, "classes": 5},
            "model.channels: 4, but the data say 2; leave it out, or mend the data",
        ),
        (
            {"width": 3},
            {"channels": 2, "features": 9},
            "model.classes: missing, and the data do not say it (they say channels 2, features 9); set model.classes",
        ),
        ({"width": 3, "channels": 1}, {}, "model.classes: missing, and the data do not say it (they say nothing); set"),
        ({"width": 3}, {"channels": "two", "classes": 1}, "what the data say is not what"),
    ],
)
def test_a_fact_that_is_another_or_is_not_there_is_told(keys: dict[str, Any], facts: dict[str, Any], text: str) -> None:
    register_tower()
    with pytest.raises(ConfigError) as caught:
        parsed("model", {"kind": "tower", **keys}).with_facts(facts)
    assert text in str(caught.value)


def test_a_parameter_with_a_default_takes_no_fact() -> None:
    @harness.model("tower")
    def tower(width: int = 64) -> nn.Module:
        return nn.Linear(width, 1)

    section = parsed("model", {"kind": "tower"})
    assert section.with_facts({"width": 28}) == (section, [])
    assert section.build({"width": 28}).in_features == 64


def test_what_the_catalogue_reads_says_its_facts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b,y\n" + "1,2,0\n3,4,1\n" * 5)
    data = parsed("data", {**BASE["data"], "path": str(tmp_path / "rows.csv")})
    splits = data.open(parsed("task", BASE["task"]), seed=1)
    assert splits.facts == {"input_shape": (2,), "num_outputs": 2, "features": 2, "outputs": 2, "classes": 2}
    splits = data.open(parsed("task", {"kind": "regression"}), seed=1)
    assert splits.facts == {"input_shape": (2,), "num_outputs": 1, "features": 2, "outputs": 1}
    digits = parsed("data", {"source": "mnist_5k", "global_batch": 4})
    facts = digits.open(parsed("task", {"kind": "classification", "num_classes": 10}), seed=1).facts
    assert {name: facts[name] for name in ("channels", "height", "width", "classes", "outputs")} == {
        "channels": 1,
        "height": 28,
        "width": 28,
        "classes": 10,
        "outputs": 10,
    }


# ---------------------------------------------------------------- what is handed to the core


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `own_splits` and `adapted` are given."""
    given: list[Any] = []

    def own_splits(make: Callable[..., Any], **settings: Any) -> str:
        given.append((make(**({"split": "train"} if settings["has_split"] else {})), settings))
        return "splits"

    def adapted(thing: Any, *, name: str) -> str:
        given.append((thing, name))
        return "task"

    rows, tasks = types.ModuleType("harness.rows.own"), types.ModuleType("harness.tasks.adapted")
    rows.own_splits, tasks.adapted = own_splits, adapted  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "harness.rows.own", rows)
    monkeypatch.setitem(sys.modules, "harness.tasks.adapted", tasks)
    return given


def test_rows_of_a_user_are_made_with_their_keys_and_the_split_is_asked_for(handed: list[Any]) -> None:
    @harness.data("clicks")
    class Clicks:
        def __init__(self, path: str, split: Literal["train", "validation"]) -> None:
            self.given = (path, split)

    @harness.data("whole")
    def whole(path: str) -> str:
        return path

    keys = {"path": "rows", "global_batch": 8, "validation_fraction": 0.5}
    task = parsed("task", BASE["task"])
    assert parsed("data", {"source": "clicks", **keys}).open(task, seed=3) == "splits"
    assert parsed("data", {"source": "whole", **keys}).open(task, seed=3) == "splits"
    (clicks, of_clicks), (path, of_whole) = handed
    assert [settings.pop("num_outputs")(None) for settings in (of_clicks, of_whole)] == [2, 2]
    assert clicks.given == ("rows", "train")
    given = {"validation_fraction": 0.5, "seed": 3, "pad": None, "workers": 0, "keys": ("inputs", "targets")}
    assert of_clicks == {"has_split": True, **given}
    assert (path, of_whole) == ("rows", {**of_clicks, "has_split": False})
    assert "split" not in type(parsed("data", {"source": "clicks", **keys})).model_fields


def test_a_task_of_a_user_is_made_and_adapted_under_its_kind(handed: list[Any]) -> None:
    @harness.task("click")
    class Click:
        def __init__(self, margin: float = 1) -> None:
            self.margin = margin

    @harness.task("segment")
    class Segment(Section):
        margin: float = 2.0

        def loss(self, outputs: Any, batch: Any) -> Any:
            raise NotImplementedError

    assert parsed("task", {"kind": "click", "margin": 2}).build(None, device=None, dtype=None) == "task"
    section = parsed("task", {"kind": "segment"})
    assert section.build(None, device=None, dtype=None) == "task"
    (click, name), (segment, other_name) = handed
    assert (click.margin, name) == (2.0, "click")
    assert (segment, other_name) == (section, "segment")


def test_what_a_users_code_raises_is_told_with_its_line(handed: list[Any]) -> None:
    def fails(depth: int = 1) -> nn.Module:
        raise RuntimeError(f"{depth} is\nnothing")

    harness.model("fails")(fails)
    harness.data("fails")(fails)
    line = fails.__code__.co_firstlineno + 1
    said = rf"raised RuntimeError: 1 is nothing \({__file__}, line {line}: raise RuntimeError"
    with pytest.raises(ConfigError, match=said):
        parsed("model", {"kind": "fails"}).build({})
    with pytest.raises(DataError, match=said):
        parsed("data", {"source": "fails", "global_batch": 1}).open(parsed("task", BASE["task"]), seed=0)
    harness.model("text")(lambda: "no network")
    with pytest.raises(ConfigError, match=r"makes a str; a torch.nn.Module is wanted"):
        parsed("model", {"kind": "text"}).build({})


# ---------------------------------------------------------------- what is known of a user's task


def test_a_metric_of_a_users_task_is_not_judged_before_the_task_is_there(tmp_path: Path) -> None:
    from harness.config.checks import check_metrics, contradictions

    harness.task("click")(lambda: None)
    config = RunConfig.model_validate(
        {**BASE, "task": {"kind": "click"}, "early_stopping": {"metric": "val/ndgc", "mode": "max"}}
    )
    assert contradictions(config) == []
    loss = {"metric": "val/loss", "mode": "max"}
    assert contradictions(config.model_validate({**config.model_dump(), "early_stopping": loss})) == [
        "early_stopping.mode: val/loss is better the lower it is; use early_stopping.mode=min"
    ]
    check_metrics(config, ["val/loss", "val/ndgc"])
    with pytest.raises(ConfigError) as caught:
        check_metrics(config, ["val/loss", "val/ndcg"])
    assert str(caught.value) == (
        "ConfigError: early_stopping.metric: click has no 'val/ndgc' (nearest: val/ndcg); it has val/loss, val/ndcg"
    )


def test_a_part_of_a_user_goes_with_any_kind_of_ours() -> None:
    from harness.config.checks import contradictions

    register_tower()
    harness.data("own")(lambda: None)
    harness.task("own")(lambda: None)
    text = {"source": "text", "path": "a.txt", "block": 8, "global_batch": 4}
    gpt = {"kind": "gpt", "layers": 1, "width": 8, "heads": 2}
    tower, own, own_task = {"kind": "tower", "width": 1}, {"source": "own", "global_batch": 4}, {"kind": "own"}
    for model, data, task in (
        (tower, text, {"kind": "causal_lm"}),
        (gpt, own, {"kind": "causal_lm"}),
        (gpt, text, own_task),
        (tower, {"source": "mnist_5k", "global_batch": 4}, {"kind": "classification", "num_classes": 10}),
        ({"kind": "pretrained", "path": "x"}, own, {"kind": "classification", "num_classes": 2}),
        (tower, own, own_task),
    ):
        assert contradictions(RunConfig.model_validate({**BASE, "model": model, "data": data, "task": task})) == []


def test_the_bases_are_what_the_core_types() -> None:
    fields = RunConfig.model_fields
    assert [fields[name].annotation for name in ("model", "data", "task")] == [ModelSection, DataSection, TaskSection]
    assert DataSplits.__dataclass_fields__["own_facts"].name == "own_facts"
