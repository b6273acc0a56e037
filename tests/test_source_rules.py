"""What no source file of ours may do: run code that it was handed as data, or swallow an exception."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
UNSAFE_YAML = {"load", "load_all", "full_load", "unsafe_load", "Loader", "FullLoader", "UnsafeLoader", "CLoader"}


def broken_rules(source: str) -> list[str]:
    """Return `line N: what is wrong` for everything in `source` that a rule forbids."""
    return [f"line {line}: {text}" for node in ast.walk(ast.parse(source)) for line, text in _broken_by(node)]


def _broken_by(node: ast.AST) -> Iterator[tuple[int, str]]:
    match node:
        case ast.keyword(arg="weights_only", value=value) if ast.unparse(value) != "True":
            yield node.lineno, f"weights_only={ast.unparse(value)} unpickles whatever the file holds"
        case ast.keyword(arg="allow_pickle", value=value) if ast.unparse(value) != "False":
            yield node.lineno, f"allow_pickle={ast.unparse(value)} unpickles whatever the file holds"
        case ast.Attribute(attr="read_pickle" | "add_safe_globals" as name):
            yield node.lineno, f"{name} is for pickles"
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"), args=args
        ) if PICKLES & {ast.unparse(arg).strip("'").partition(".")[0] for arg in args}:
            yield node.lineno, "unpickling runs code from the data"
        case ast.Import(names=names) if PICKLES & {alias.name.partition(".")[0] for alias in names}:
            yield node.lineno, "unpickling runs code from the data"
        case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in PICKLES:
            yield node.lineno, "unpickling runs code from the data"
        case ast.ImportFrom(module="yaml", names=names) if UNSAFE_YAML & {alias.name for alias in names}:
            yield node.lineno, "YAML is read with a safe loader only"
        case ast.Attribute(value=ast.Name(id="yaml"), attr=attribute) if attribute in UNSAFE_YAML:
            yield node.lineno, "YAML is read with a safe loader only"
        case (
            ast.Call(func=ast.Name(id="eval" | "exec" as name))
            | ast.Call(func=ast.Attribute(value=ast.Name(id="builtins"), attr="eval" | "exec" as name))
        ):
            yield node.lineno, f"{name} runs text as code"
        case ast.ExceptHandler(type=None, body=body) if not _raises(body):
            yield node.lineno, "a bare except swallows even Ctrl-C"
        case ast.ExceptHandler(body=body) if all(_is_blank(statement) for statement in body):
            yield node.lineno, "an exception is swallowed"
        case ast.Call(func=ast.Name(id="suppress") | ast.Attribute(attr="suppress"), args=kinds) if {
            "Exception",
            "BaseException",
        } & {ast.unparse(kind) for kind in kinds}:
            yield node.lineno, "every exception is swallowed"


def _is_blank(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _raises(body: list[ast.stmt]) -> bool:
    return any(isinstance(node, ast.Raise) for statement in body for node in ast.walk(statement))


def test_no_source_file_breaks_a_rule() -> None:
    files = sorted([*ROOT.glob("harness/**/*.py"), *ROOT.glob("launch/**/*.py")])
    found = [f"{file.relative_to(ROOT)} {text}" for file in files for text in broken_rules(file.read_text())]
    assert len(files) > 10
    assert found == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch\ntorch.load(path, weights_only=False)", "line 2: weights_only=False"),
        ("import torch\ntorch.load(path, weights_only=safe)", "line 2: weights_only=safe"),
        ("import numpy\nnumpy.load(path, allow_pickle=True)", "line 2: allow_pickle=True"),
        ("import pandas\npandas.read_pickle(path)", "line 2: read_pickle"),
        ("from torch import serialization\nserialization.add_safe_globals([X])", "line 2: add_safe_globals"),
        ("import importlib\nimportlib.import_module('pickle')", "line 2: unpickling"),
        ("__import__('dill')", "line 1: unpickling"),
        ("import pickle", "line 1: unpickling"),
        ("import numpy, cloudpickle as cp", "line 1: unpickling"),
        ("from dill.source import getsource", "line 1: unpickling"),
        ("import yaml\nyaml.load(text, Loader=Mine)", "line 2: YAML"),
        ("import yaml\nclass Mine(yaml.Loader): ...", "line 2: YAML"),
        ("from yaml import UnsafeLoader", "line 1: YAML"),
        ("def f(x):\n    return eval(x)", "line 2: eval"),
        ("exec(text, {})", "line 1: exec"),
        ("import builtins\nbuiltins.exec(text)", "line 2: exec"),
        ("try:\n    f()\nexcept ValueError:\n    pass", "line 3: an exception is swallowed"),
        ("try:\n    f()\nexcept* ValueError:\n    'nothing to do'", "line 3: an exception is swallowed"),
        ("try:\n    f()\nexcept (OSError, KeyError) as error:\n    ...", "line 3: an exception is swallowed"),
        ("try:\n    f()\nexcept:\n    print('oh')", "line 3: a bare except"),
        ("with contextlib.suppress(OSError, Exception):\n    f()", "line 1: every exception"),
    ],
)
def test_each_rule_fires(source: str, message: str) -> None:
    found = broken_rules(source)
    assert len(found) == 1
    assert found[0].startswith(message)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "numpy.load(path, allow_pickle=False)",
        "import importlib\nimportlib.import_module(name)",
        "model.eval()",
        "import yaml\nyaml.safe_load(text)\nclass Mine(yaml.SafeLoader): ...",
        "try:\n    f()\nexcept OSError as error:\n    raise ValueError('x') from error",
        "try:\n    f()\nexcept ProcessLookupError:\n    continue_with_the_next()",
        "try:\n    f()\nexcept:\n    undo()\n    raise",
        "with contextlib.suppress(FileNotFoundError):\n    f()",
    ],
)
def test_what_only_looks_alike_is_fine(source: str) -> None:
    assert broken_rules(source) == []
