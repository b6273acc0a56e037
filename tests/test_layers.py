"""No arrow points up: the layers of CONTRIBUTING.md, read from the imports."""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = {
    0: (
        "harness/__init__.py",
        "harness/errors.py",
        "harness/own_code.py",
        "harness/record/exit_file.py",
        "harness/record/files.py",
        "harness/record/json_lines.py",
        "harness/record/provenance.py",
        "harness/ranks/host_memory.py",
        "harness/ranks/process.py",
        "harness/ranks/visible_gpus.py",
        "harness/report/at_end.py",
    ),
    1: (
        "harness/config/",
        "harness/catalogue/__init__.py",
        "harness/catalogue/*/section.py",
        "harness/parts.py",
        "harness/record/",
        "harness/agenda.py",
        "harness/ranks/env.py",
        "harness/ranks/rank_log.py",
        "harness/schedule.py",
        "harness/state.py",
        "harness/stopping.py",
    ),
    2: (
        "harness/rows/",
        "harness/examples/",
        "harness/optim.py",
        "harness/scores.py",
        "harness/tasks/",
    ),
    3: ("harness/ranks/", "harness/strategy/"),
    4: ("harness/checkpoint/", "harness/observers/", "harness/doctor/", "harness/watch/"),
    5: (
        "harness/ballot.py",
        "harness/fits.py",
        "harness/loop.py",
        "harness/interval.py",
        "harness/saving.py",
        "harness/run.py",
    ),
    6: (
        "harness/train.py",
        "harness/session.py",
        "harness/announce.py",
        "harness/assemble.py",
        "harness/export.py",
        "harness/exported.py",
        "harness/report/",
        "harness/tracking/",
    ),
    7: ("harness/catalogue/", "harness/api.py", "harness/sample.py"),
    8: ("launch/",),
}
LAUNCH_LAYER, LAUNCH_MAY_USE = 8, (0, 1, 8)
SECTIONS = (
    "harness/catalogue/*/section.py",
    "harness/config/data.py",
    "harness/config/signature.py",
    "harness/config/slots.py",
)
"""What is of layer 1 when it is imported; its methods import what makes the thing, of any layer of the catalogue."""
DOOR = {"harness/__init__.py": ("harness/parts.py", "harness/api.py")}
"""A file that imports what is above it, late."""
NAMES_AT_RUN_TIME = ("harness/parts.py", "harness/config/use.py")
"""What imports modules whose names are not in the code: the sections of the catalogue, and what `use` names."""
LIBRARIES = {
    0: set(),
    1: {"packaging", "pydantic", "yaml"},
    2: {
        "torch",
        "numpy",
        "datasets",
        "fsspec",
        "peft",
        "pyarrow",
        "tokenizers",
        "transformers",
        "torchmetrics",
        "PIL",
        "mlxtend",
    },
    3: {"torch", "numpy", "accelerate", "deepspeed"},
    4: {"torch", "numpy", "safetensors", "xxhash", "rich"},
    5: {"torch"},
    6: {"torch", "numpy", "pydantic", "safetensors", "yaml", "jinja2", "matplotlib", "wandb", "tensorboard"},
    8: {"jinja2", "pydantic", "yaml"},
}
LIBRARIES[7] = LIBRARIES[2] | LIBRARIES[4]
ONLY_FOR_TYPES = {1: {"torch"}}
"""What a layer may import under TYPE_CHECKING as well."""

PLACES = {
    "accelerate": ("harness/strategy/",),
    "deepspeed": ("harness/strategy/",),
    "torch.distributed": ("harness/strategy/", "harness/ranks/"),
    "wandb": ("harness/tracking/wandb.py",),
    "transformers": ("harness/catalogue/pretrained/network.py",),
    "peft": ("harness/catalogue/pretrained/lora.py",),
    "matplotlib": ("harness/report/",),
    "jinja2": ("harness/report/", "launch/"),
    "tensorboard": ("harness/tracking/tensorboard.py",),
}
"""Names that only some files may use, whatever their layer."""
ONLY_LATE = {"wandb", "tensorboard", "transformers", "peft"}
"""Names that are imported in functions only, because their import takes seconds or does something."""


@dataclass(frozen=True)
class Import:
    """One imported name, such as `torch.distributed`."""

    name: str
    is_late: bool
    is_for_types: bool


def layer_of(path: str) -> int | None:
    """Return the layer of a file or folder, by the longest entry that it is or lies in."""
    entries = {entry: layer for layer, group in LAYERS.items() for entry in group}
    fitting = [entry for entry in entries if fnmatch(path, entry) or (entry.endswith("/") and path.startswith(entry))]
    return entries[max(fitting, key=len)] if fitting else None


def imports_of(tree: ast.Module, *, package: str) -> Iterator[Import]:
    """Yield what a module imports anywhere in it; `torch.distributed` also where it is only an attribute."""

    def visit(node: ast.AST, *, is_late: bool, is_for_types: bool) -> Iterator[Import]:
        is_late |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for name in names(node):
            yield Import(name, is_late, is_for_types)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, is_late=is_late, is_for_types=True)
            for child in node.orelse:
                yield from visit(child, is_late=is_late, is_for_types=is_for_types)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_late=is_late, is_for_types=is_for_types)

    def names(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            return [f"{module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            return ["torch.distributed"]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            return [node.args[0].value if isinstance(node.args[0], ast.Constant) else "a name made at run time"]
        return []

    yield from visit(tree, is_late=False, is_for_types=False)


def our_file(name: str, root: Path) -> str | None:
    """Return the path of the module that `name` is or lies in, if it is one of ours."""
    parts = name.split(".")
    if parts[0] != "harness":
        return None
    if parts[1:2] == ["launch"]:  # of which harness/ has a link
        del parts[0]
    while len(parts) > 1:
        path = "/".join(parts)
        if (root / f"{path}.py").exists():
            return f"{path}.py"
        if (root / path).is_dir():
            return f"{path}/"
        parts.pop()
    return f"{parts[0]}/__init__.py"


def problems(root: Path) -> list[str]:
    """Return a sentence for every file without a layer and every import that its layer does not allow."""
    found = []
    for file in sorted([*root.glob("harness/**/*.py"), *root.glob("launch/**/*.py")]):
        path = file.relative_to(root).as_posix()
        layer = layer_of(path)
        if layer is None:
            found.append(f"{path} is in no layer: give it one in tests/test_layers.py")
            continue
        package = ".".join(Path(path).parent.parts)
        for imported in imports_of(ast.parse(file.read_bytes()), package=package):
            found += [f"{path} (layer {layer}) imports {text}" for text in _problems(path, layer, imported, root)]
    return list(dict.fromkeys(found))


def _may_point_up(path: str, ours: str, imported: Import) -> bool:
    is_late = imported.is_late or imported.is_for_types
    if any(fnmatch(path, sections) for sections in SECTIONS):
        return is_late and ours.startswith(("harness/catalogue/", "harness/rows", "harness/tasks"))
    return ours in DOOR.get(path, ()) and imported.is_late


def _problems(path: str, layer: int, imported: Import, root: Path) -> Iterator[str]:
    ours = our_file(imported.name, root)
    if ours is not None:
        module = ours.removesuffix("/__init__.py").removesuffix(".py").rstrip("/").replace("/", ".")
        their_layer = layer_of(ours)
        if _may_point_up(path, ours, imported):
            return
        if their_layer is not None and their_layer > layer:
            yield f"{module} (layer {their_layer})"
        if layer == LAUNCH_LAYER and their_layer not in LAUNCH_MAY_USE:
            yield f"{module} (layer {their_layer}), but launch may use layers 0 and 1 only"
        return
    library = imported.name.partition(".")[0]
    if library in sys.stdlib_module_names:
        return
    if imported.name == "a name made at run time" and path in NAMES_AT_RUN_TIME:
        return
    if library == "torch" and imported.is_late and any(fnmatch(path, sections) for sections in SECTIONS):
        return
    allowed = LIBRARIES[layer] | (ONLY_FOR_TYPES.get(layer, set()) if imported.is_for_types else set())
    if library not in allowed:
        yield f"{library}, which this layer may not"
    for name, places in PLACES.items():
        is_named = imported.name == name or imported.name.startswith(f"{name}.")
        if is_named and not any(path == place or path.startswith(f"{place.rstrip('/')}/") for place in places):
            yield f"{name}, which is for {' and '.join(places)} only"
    if library in ONLY_LATE and not (imported.is_late or imported.is_for_types):
        yield f"{library} at its top; import it in the function that needs it"


def test_no_import_points_up_and_every_library_is_used_in_its_place() -> None:
    assert problems(ROOT) == []


KIND = re.compile(r"\b(model|data|task)\.(kind|source) (==|!=|in|not in) ")


def asked_kinds(root: Path) -> list[str]:
    """Return a sentence for each place of the core that imports the catalogue, or compares the kind of a part."""
    found = []
    for file in sorted([*root.glob("harness/**/*.py"), *root.glob("launch/**/*.py")]):
        path = file.relative_to(root).as_posix()
        if path.startswith("harness/catalogue/") or layer_of(path) == 7:
            continue
        tree = ast.parse(file.read_bytes())
        for imported in imports_of(tree, package=".".join(Path(path).parent.parts)):
            ours = our_file(imported.name, root)
            if ours and ours.startswith("harness/catalogue/") and not _may_point_up(path, ours, imported):
                found.append(f"{path} imports {imported.name}: have the section of the part say it, or do it")
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and KIND.search(ast.unparse(node)):
                found.append(
                    f"{path} line {node.lineno} asks for a kind ({ast.unparse(node)}): have its section say it"
                )
    return list(dict.fromkeys(found))


def test_the_core_asks_no_part_for_its_kind() -> None:
    assert asked_kinds(ROOT) == []


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "from harness.catalogue.mlp.section import MlpModel",
            "harness/loop.py imports harness.catalogue.mlp.section.MlpModel: have the section of the part say it, or "
            "do it",
        ),
        (
            "def f(config):\n    return config.model.kind != 'mlp'",
            "harness/loop.py line 2 asks for a kind (config.model.kind != 'mlp'): have its section say it",
        ),
        (
            "def f(data):\n    return data.source in ('csv', 'json')",
            "harness/loop.py line 2 asks for a kind (data.source in ('csv', 'json')): have its section say it",
        ),
    ],
)
def test_a_core_that_asks_for_a_kind_is_told(tmp_path: Path, source: str, sentence: str) -> None:
    _write(tmp_path / "harness/loop.py", source)
    _write(tmp_path / "harness/catalogue/mlp/section.py", "")
    assert asked_kinds(tmp_path) == [sentence]


def test_the_files_of_layer_0_and_1_are_all_there() -> None:
    missing = [entry for layer in (0, 1) for entry in LAYERS[layer] if not any(ROOT.glob(entry))]
    assert missing == []


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        (
            "harness/loop.py",
            "from harness.train import main",
            "harness/loop.py (layer 5) imports harness.train (layer 6)",
        ),
        (
            "harness/loop.py",
            "def f():\n    from harness import train",
            "harness/loop.py (layer 5) imports harness.train (layer 6)",
        ),
        (
            "harness/rows/order.py",
            "if True:\n    import harness.loop as it",
            "harness/rows/order.py (layer 2) imports harness.loop (layer 5)",
        ),
        (
            "harness/rows/order.py",
            "from ..loop import fit",
            "harness/rows/order.py (layer 2) imports harness.loop (layer 5)",
        ),
        (
            "harness/state.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from harness.loop import fit",
            "harness/state.py (layer 1) imports harness.loop (layer 5)",
        ),
        ("harness/state.py", "import torch", "harness/state.py (layer 1) imports torch, which this layer may not"),
        (
            "harness/state.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch",
            "harness/state.py (layer 1) imports torch, which this layer may not",
        ),
        ("harness/errors.py", "import yaml", "harness/errors.py (layer 0) imports yaml, which this layer may not"),
        (
            "harness/ranks/env.py",
            "import torch",
            "harness/ranks/env.py (layer 1) imports torch, which this layer may not",
        ),
        (
            "harness/checkpoint/store.py",
            "import accelerate.utils",
            "harness/checkpoint/store.py (layer 4) imports accelerate, which is for harness/strategy/ only",
        ),
        (
            "harness/train.py",
            "def f():\n    import deepspeed",
            "harness/train.py (layer 6) imports deepspeed, which is for harness/strategy/ only",
        ),
        (
            "harness/optim.py",
            "from torch import distributed",
            "harness/optim.py (layer 2) imports torch.distributed, which is for harness/strategy/ and "
            "harness/ranks/ only",
        ),
        (
            "harness/optim.py",
            "import torch\ntorch.distributed.barrier()",
            "harness/optim.py (layer 2) imports torch.distributed, which is for harness/strategy/ and "
            "harness/ranks/ only",
        ),
        (
            "harness/observers/ledger.py",
            "def f():\n    import wandb",
            "harness/observers/ledger.py (layer 4) imports wandb, which is for harness/tracking/wandb.py only",
        ),
        (
            "harness/tracking/wandb.py",
            "import wandb",
            "harness/tracking/wandb.py (layer 6) imports wandb at its top; import it in the function that needs it",
        ),
        (
            "launch/cli.py",
            "def f():\n    from harness.train import main",
            "launch/cli.py (layer 8) imports harness.train (layer 6), but launch may use layers 0 and 1 only",
        ),
        ("launch/cli.py", "import torch", "launch/cli.py (layer 8) imports torch, which this layer may not"),
        # It may be anybody's; ours is harness.launch.
        ("launch/cli.py", "import launch.plan", "launch/cli.py (layer 8) imports launch, which this layer may not"),
        (
            "harness/loop.py",
            "from harness.launch import plan",
            "harness/loop.py (layer 5) imports launch.plan (layer 8)",
        ),
        (
            "launch/cli.py",
            "import importlib\nimportlib.import_module('torch')",
            "launch/cli.py (layer 8) imports torch, which this layer may not",
        ),
        ("harness/new.py", "", "harness/new.py is in no layer: give it one in tests/test_layers.py"),
    ],
)
def test_an_import_that_points_up_is_told_in_a_sentence(tmp_path: Path, path: str, source: str, sentence: str) -> None:
    for name in ("harness/loop.py", "harness/train.py", "launch/plan.py"):
        _write(tmp_path / name, "")
    _write(tmp_path / path, source)
    assert sentence in problems(tmp_path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("harness/loop.py", "import math\nimport torch\nfrom harness.state import TrainState"),
        ("harness/state.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
        ("harness/tracking/wandb.py", "def f():\n    import wandb"),
        ("harness/strategy/ddp.py", "import torch.distributed as dist\nfrom accelerate import Accelerator"),
        ("harness/saving.py", "from harness import __version__"),
        ("harness/catalogue/cnn/network.py", "from . import mlp\nfrom harness.models import mlp"),
        ("launch/cli.py", "from harness.launch.plan import launch_plan\nfrom harness.config.io import load_config"),
    ],
)
def test_an_import_that_points_down_or_sideways_is_fine(tmp_path: Path, path: str, source: str) -> None:
    for name in ("harness/__init__.py", "harness/state.py", "harness/catalogue/mlp/network.py", "launch/plan.py"):
        _write(tmp_path / name, "")
    _write(tmp_path / path, source)
    assert problems(tmp_path) == []


def _write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
