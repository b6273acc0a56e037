"""Takes the network out of a run: `python -m harness.export RUN --to DIR`, on one process, without any engine.

DIR holds model.safetensors, every parameter and buffer by name (of a run with `ema` the averages of the parameters,
which were evaluated), and config.json, from which `harness.load` builds the network again; a language model has its
tokenizer.json beside them (`tokenizer_from_json` reads it). Of a pretrained model DIR is as transformers wants it: its
config.json, its names of tensors (what LoRA added is added) and what the model's directory has beside them, such as the
tokenizer; what `harness.load` wants to know is in harness.json. It is loaded back, and gives the logits of the run.
"""

import argparse
import os
import shlex
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness.checkpoint.tensors import TensorFiles, write_tensors
from harness.config.use import load_used
from harness.errors import EXIT_DONE, CheckpointError, ConfigError, HarnessError, StorageError
from harness.exported import CONFIG, MODEL, TOKENIZER, Saved, read_export, warn_of_other_code
from harness.record.checkpoints import CheckpointDirectory
from harness.record.files import json_bytes, new_directory, storage_errors, write_durably
from harness.record.manifest import checkpoint_problems, read_manifest, read_trainer
from harness.record.progress import check_trainer
from harness.record.run_directory import read_identity, stored_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says, and return the exit code."""
    parser = argparse.ArgumentParser(prog="harness export", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory, such as runs/mnist-cnn")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="a new folder for the network")
    parser.add_argument("--from", dest="step", metavar="best|latest|STEP", default="best", help="default: best")
    parser.add_argument("--use", metavar="FILE", action="append", default=[], help="that brings the network's kind")
    given = parser.parse_args(arguments)
    try:
        load_used(given.use, folder=Path.cwd(), is_typed=True)
        checkpoint = find_checkpoint(given.run, given.step)
        with unless_deleted(checkpoint):
            export(given.run, checkpoint, to=given.to)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    how = f"{str(given.to)!r}" + (f", use={given.use}" if given.use else "")
    print(f"{checkpoint} is exported to {given.to}: harness.load({how}) builds it")
    return EXIT_DONE


def find_checkpoint(run: Path, which: str, *, how: str = "--from STEP") -> Path:
    """Return the checkpoint of a run that is called best, latest or by its step.

    Args:
        how: another one is asked for, for the message.
    Raises:
        CheckpointError: there is none.
        ConfigError: it is no run directory.
    """
    if not (run / "checkpoints").is_dir():
        raise ConfigError(f"{run} is not a run directory: it has no checkpoints/. Give one such as runs/mnist-cnn")
    directory = CheckpointDirectory(run / "checkpoints")
    names = [path.name for path in directory.steps()]
    match which:
        case "best":
            wanted = directory.best()
        case "latest":  # LATEST is but a hint: a kill may have come before it was written
            wanted = directory.newest()
        case _:
            wanted = f"step-{int(which):08d}" if which.isdecimal() else ""
    if wanted not in names:
        found = ", ".join(str(int(name.removeprefix("step-"))) for name in names) or "none"
        raise CheckpointError(f"{directory.path} has no {which} checkpoint; there are steps {found} ({how})")
    return directory.path / wanted


@contextmanager
def unless_deleted(checkpoint: Path, *, again: str = "Start the same command again") -> Iterator[None]:
    """Say so if what fails inside fails because the run, which goes on, has deleted the checkpoint."""
    try:
        yield
    except (CheckpointError, StorageError, OSError, ValueError) as error:
        if checkpoint.exists():
            raise
        raise CheckpointError(f"{checkpoint} was deleted by the run meanwhile. {again}") from error


def read_checkpoint(run: Path, checkpoint: Path, *, how: str = "--from STEP") -> Saved:
    """Return the network that a checkpoint holds, and what is known of it; every byte of it is verified.

    Args:
        how: another one is asked for, for the message.
    Raises:
        CheckpointError: the checkpoint is broken.
        ConfigError: the run's config.yaml is damaged.
    """
    problems = checkpoint_problems(checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint} is broken: {problems[0]}. Choose another with {how}")
    manifest, trainer = read_manifest(checkpoint), read_trainer(checkpoint)
    check_trainer(trainer, checkpoint, step=manifest.step)
    config = stored_config(run)
    described: dict[str, Any] = {
        "model": config.model.model_dump(mode="json"),
        **{key: trainer[key] for key in ("input_shape", "num_outputs", "step", "harness", "preprocessing")},
        "metrics": trainer["metrics"] if trainer["evaluated_step"] == trainer["step"] else {},  # else of other weights
        "seed": config.run.seed,
    }
    if not (config.model.is_ours and config.data.is_ours):
        identity = read_identity(run)
        described |= {"named": list(config.use), "use": identity.get("use", []), "facts": identity.get("facts", {})}
    live = TensorFiles(checkpoint, manifest.names("model"))
    averaged = TensorFiles(checkpoint, manifest.names("ema"), prefix="weight/")
    tensors: Mapping[str, Tensor] = ChainMap(averaged, live)  # type: ignore[arg-type]  # it is only read
    return Saved(checkpoint, described, tensors, trainer["tokenizer"], config)


def export(run: Path, checkpoint: Path, *, to: Path) -> None:
    """Write the network of a checkpoint to a new folder; a pretrained one is in memory meanwhile.

    Raises:
        CheckpointError: the checkpoint is broken.
        ConfigError: the folder is there already, or the run's config.yaml is damaged.
        StorageError: it cannot be written.
    """
    saved = read_checkpoint(run, checkpoint)
    section = saved.section(
        advice=lambda files: f"Type: harness export {run} --to {to} --use {' --use '.join(map(shlex.quote, files))}"
    )
    if os.path.lexists(to):
        raise ConfigError(f"--to: {to} is there already; give the name of a new folder")
    assert saved.tensors is not None, "a checkpoint has tensors"
    described = dict(saved.described)
    with storage_errors("write", to), new_directory(to) as directory:
        if section.is_of_transformers:
            section.write_export(directory, saved.tensors, described)
            return
        write_tensors(directory / MODEL, saved.tensors)
        write_durably(directory / CONFIG, [json_bytes(described)])
        if saved.tokenizer:
            write_durably(directory / TOKENIZER, [saved.tokenizer.encode()])


def load_exported(directory: str | Path, *, use: Sequence[str] = ()) -> nn.Module:
    """Return the network of an exported folder, in evaluation mode, on the CPU; `harness.load` tells more of it.

    Args:
        use: files that register its kind, where that is not built in; the folder itself brings no code.
    """
    used, saved = load_used(use, folder=Path.cwd(), is_typed=True), read_export(Path(directory))
    section = saved.section(
        advice=lambda files: f"Write load_exported({str(directory)!r}, use={files}), and read that file before"
    )
    warn_of_other_code(saved, used, stacklevel=2)
    return saved.network(section)


if __name__ == "__main__":
    sys.exit(main())
