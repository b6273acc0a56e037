"""Checks of what is there, and that everything of a run is on the device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.gpu.packages import NEEDED

Figures = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
ROWS = 600


def packages() -> Figures:
    """Refuse a Python that lacks what the harness imports, and name it."""
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    names = [NEEDED[module] for module in missing]
    assert not missing, (
        f"Python has not {', '.join(missing)} (of {', '.join(names)}); where there is network type make gpu-wheels, "
        "copy gpu-wheels/ here and type make gpu-check; what is too large for that folder is to be installed by hand"
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "accelerate", "deepspeed", "numpy")}
    return {"python": platform.python_version(), **versions}


def machine() -> Figures:
    """Say what there is, and refuse a GPU that nvidia-smi lists and torch cannot use."""
    from harness.ranks.join import refuse_unusable_gpus
    from harness.ranks.visible_gpus import count_gpus

    figures: Figures = {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0))}
    figures["compiler"] = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "none")
    if not torch.cuda.is_available():
        refuse_unusable_gpus(count_gpus())
        return {**figures, "gpu": "none"}
    properties = torch.cuda.get_device_properties(0)
    figures |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    figures |= {"capability": f"{properties.major}.{properties.minor}", "gib": properties.total_memory / 2**30}
    figures |= {"driver": _driver(), "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
    listed = count_gpus()
    assert listed <= torch.cuda.device_count(), f"nvidia-smi lists {listed} GPUs, torch {torch.cuda.device_count()}"
    a = torch.eye(64, device="cuda")  # the first kernel: a torch without code for this GPU fails here
    assert torch.equal((a @ a).cpu(), torch.eye(64)), "a product of matrices is wrong"
    return figures


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def placement() -> Figures:
    """Make one update of every configuration of configs/ on rows of our own, and look where its tensors are."""
    assert CONFIGS, f"there are no configurations in {REPOSITORY / 'configs'}"
    problems, num_tensors = [], 0
    for path in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                num_tensors += _place(path, Path(folder))
            except Exception as error:
                problems.append(f"{path.stem}: {type(error).__name__}: {error}")
    assert not problems, f"{len(problems)} of {len(CONFIGS)} configurations: {'; '.join(problems)}"
    return {"configs": len(CONFIGS), "tensors_on_the_device": num_tensors}


def _place(path: Path, folder: Path) -> int:
    from harness.assemble import assemble
    from harness.config.io import load_config
    from harness.state import TrainState
    from harness.stopping import StopSignals
    from tests.gpu.small import device, joined, make_updates
    from tests.sections import build_model, load, prepare

    overrides = write_rows(load_config(path).config, folder)
    config = load_config(path, [*overrides, "run.max_steps=1000", "schedule={kind: constant}"], world_size=1).config
    if config.data.source == "mnist_5k":
        splits = _digits()
    else:
        prepare(config.data, config.task, seed=config.run.seed)
        splits = load(config.data, config.task, seed=config.run.seed)
    torch.manual_seed(config.run.seed)
    model = build_model(config.model, input_shape=splits.input_shape, num_outputs=splits.num_outputs)
    (folder / "checkpoints").mkdir()
    run = assemble(config, joined(config.strategy.kind), splits, model, directory=folder, signals=StopSignals())
    (line,) = make_updates(run, TrainState(), until=1)
    run.checkpoints.close()
    assert line["applied"], "the update was not applied"
    tensors = dict(_tensors(run))
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != device().type]
    assert not elsewhere, f"{len(elsewhere)} of {len(tensors)} tensors are not on {device()}, such as {elsewhere[0]}"
    assert sum(name.startswith("moment") for name in tensors) > 0, "the optimizer has no moments"
    return len(tensors)


def workers() -> Figures:
    """Compare batches that worker processes read, while the device computes, with those that the rank reads itself."""
    from harness.rows.batches import TrainingBatches
    from harness.rows.dataset import DatasetRows
    from harness.rows.order import BatchPlan
    from tests.gpu.small import device

    plan = BatchPlan(num_rows=512, global_batch=48, world_size=1, micro_batch=20, seed=0)
    both = [
        TrainingBatches(
            DatasetRows(_Pictures(), seed=1, workers=count), plan, rank=0, device=device(), dtype=torch.float32
        )
        for count in (0, 2)
    ]
    ahead = both[1]
    is_on_gpu = device().type == "cuda"
    work = torch.randn(2 * [4096 if is_on_gpu else 64], device=device())
    positions = range(3, 63 if is_on_gpu else 13)
    ahead.start(positions.start)
    try:
        for position in positions:
            work = torch.tanh(work @ work)  # copies run beside it
            for alone, mine in zip(*(batches.at(position) for batches in both), strict=True):
                assert mine.data["picture"].device.type == device().type, "a batch is not on the device"
                for name, tensor in mine.data.items():
                    assert torch.equal(tensor, alone.data[name]), f"{name} at position {position} is another"
    finally:
        ahead.close()
    return {"batches": 3 * len(positions), "device": str(device())}


class _Pictures(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 512

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"picture": torch.randn(3, 64, 64), "label": torch.tensor(i)}


def _tensors(run: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield everything that an update reads or writes, by name."""
    strategy = run.strategy
    yield from strategy.module.named_parameters()
    yield from strategy.module.named_buffers()
    for index, state in enumerate(strategy.optimizer.state.values()):
        for moment, value in state.items():
            # Of Adafactor, Muon and its AdamW torch keeps the count of steps on the host.
            if isinstance(value, Tensor) and (value.dim() or moment != "step"):
                yield f"moment {moment} of parameter {index}", value
    for split, rows in (("training", run.batches.at(1)), ("validation", list(run.validation)[:1])):
        for batch in rows:
            yield f"inputs of a {split} batch", batch.data["inputs"]
            yield f"targets of a {split} batch", batch.data["targets"]
            yield "outputs", strategy.predict(batch.data["inputs"])
    if isinstance(getattr(run.task, "_class_weights", None), Tensor):
        yield "class weights", run.task._class_weights


def _digits() -> Any:
    from harness.rows.rows import Columns
    from harness.rows.splits import DataSplits

    generator = torch.Generator().manual_seed(0)
    columns = Columns(torch.rand(ROWS, 1, 28, 28, generator=generator), torch.arange(ROWS) % 10)
    return DataSplits(columns, columns, (1, 28, 28), 10)


def write_rows(config: Any, folder: Path) -> list[str]:
    """Write rows of the kind that a configuration wants, and return the overrides that name them."""
    chance = random.Random(0)
    data = config.data
    match data.source:
        case "mnist_5k":
            return []
        case "parquet":
            numbers = {f"number_{index}": [chance.random() for _ in range(ROWS)] for index in range(8)}
            texts = {name: [f"{name} {chance.randrange(4)}" for _ in range(ROWS)] for name in data.categorical}
            classes = {name: [row % config.task.num_classes for row in range(ROWS)] for name in data.targets}
            return [f"data.path={_parquet(folder / 'rows.parquet', {**numbers, **texts, **classes})}"]
        case "text":
            words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(6000)]
            for document in range(8):
                (folder / f"{document}.txt").write_text(" ".join(chance.choices(words, k=6000)))
            return [f"data.path={folder}/*.txt"]
        case "text_table":
            from tests.tiny_models import WORDS, write_model

            sizes = {"num_hidden_layers": 1 + (config.model.frozen_layers or 0)}
            model = write_model(folder / "model", **sizes, max_position_embeddings=data.max_tokens)
            rows = {
                data.text: [" ".join(chance.choices(WORDS, k=12)) for _ in range(ROWS)],
                data.target: [f"class {row % config.task.num_classes}" for row in range(ROWS)],
            }
            table = _parquet(folder / "rows.parquet", rows)
            return [f"data.path={table}", f"data.validation_path={table}", f"model.path={model}"]
        case other:
            raise AssertionError(f"no rows are known for data.source {other}: write some in tests/gpu/place.py")


def _parquet(path: Path, columns: Mapping[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), path)
    return path


def random_state() -> Figures:
    """Capture the state of every generator, draw, put it back and draw again, on the device and the host."""
    from harness.checkpoint import rng

    def draw() -> list[Any]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dropped = nn.functional.dropout(torch.ones(1000, device=device), p=0.5)
        numbers = torch.rand(1000, device=device)
        return [dropped.tolist(), numbers.tolist(), torch.rand(9).tolist(), random.random(), np.random.rand()]

    rng.seed_everything(11)
    draw()
    state = {name: tensor.clone() for name, tensor in rng.capture().items()}
    first, second = draw(), draw()
    assert first != second, "the generators stand still"
    rng.restore(state)
    names = ("dropout", "the device", "torch", "python", "numpy")
    again = draw()
    other = [name for name, a, b in zip(names, first, again, strict=True) if a != b]
    assert not other, f"other numbers are drawn after the state was restored, by {', '.join(other)}"
    assert not torch.cuda.is_available() or "cuda" in state, "CUDA's generator is not in the state"
    return {"generators": len({name.partition("/")[0] for name in state})}


def resume() -> Figures:
    """Train in one go and in two, as a person does, and compare every tensor and random state that was saved."""
    with tempfile.TemporaryDirectory(prefix="two runs ") as name:
        folder = Path(name)
        columns = _regression_rows()
        table = _parquet(folder / "rows.parquet", columns)
        config = {
            "run": {"name": "whole", "output_root": str(folder), "max_steps": 24, "seed": 5},
            "model": {"kind": "mlp", "hidden": [64, 64], "norm": "batch", "dropout": 0.3},
            "data": {"source": "parquet", "path": str(table), "targets": ["y"], "global_batch": 32},
            "task": {"kind": "regression"},
            "optim": {"kind": "adamw", "peak_lr": 1e-2, "weight_decay": 0.1},
            "ema": {"decay": 0.9},
            "strategy": {"kind": "ddp", "precision": "bf16"},
            "checkpoint": {"every_steps": 8, "keep_last": 9},
            "tracking": {"report": False},
        }
        path = folder / "run.yaml"
        path.write_text(json.dumps(config))
        _train(path)
        _train(path, "run.name=halves", "run.max_steps=11")
        _train(path, "run.name=halves")
        compared = {}
        for step in (16, 24):
            whole, halves = (_saved(folder / run / "checkpoints" / f"step-{step:08d}") for run in ("whole", "halves"))
            different = [key for key in whole if whole[key] != halves.get(key)]
            assert not different, f"at update {step} {len(different)} of {len(whole)} differ, such as {different[0]}"
            compared[step] = len(whole)
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", "tensors_equal": sum(compared.values())}


def _regression_rows() -> dict[str, list[float]]:
    chance = random.Random(1)
    columns = {name: [chance.gauss(0, 1) for _ in range(ROWS)] for name in "abc"}
    columns["y"] = [a - b * c for a, b, c in zip(columns["a"], columns["b"], columns["c"], strict=True)]
    return columns


def _train(config: Path, *overrides: str) -> None:
    """Run `python -m harness.train`, broken if this check is to be."""
    command = [sys.executable, "-m", "tests.gpu.train", str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
    last = "".join(done.stderr.strip().splitlines()[-1:])
    assert done.returncode == 0, f"training ended with {done.returncode}: {last}"


def _saved(directory: Path) -> dict[str, str]:
    """Return a digest of everything that a checkpoint holds of the state of training."""
    from harness.record.manifest import read_manifest

    manifest = read_manifest(directory)
    random_states = {entry.name: entry.sha256 for entry in manifest.files if entry.name in manifest.names("rng")}
    return {**manifest.tensors, **random_states}
