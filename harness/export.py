"""Takes the network out of a run: `python -m harness.export RUN --to DIR`, on one process, without any engine.

DIR holds model.safetensors, every parameter and buffer by name (of a run with `ema` the averages of the parameters,
which were evaluated), and config.json, from which `load_exported` builds the network again; a language model has its
tokenizer.json beside them (`tokenizer_from_json` reads it). Of a pretrained model DIR is as transformers wants it: its
config.json, its names of tensors (what LoRA added is added) and what the model's directory has beside them, such as the
tokenizer; what `load_exported` wants to know is in harness.json. It is loaded back, and gives the logits of the run.
"""

import argparse
import json
import os
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness.checkpoint.tensors import TensorFiles, write_tensors
from harness.config.slots import ModelSection
from harness.config.use import load_used
from harness.errors import EXIT_DONE, CheckpointError, ConfigError, HarnessError, StorageError
from harness.exported import CONFIG, DESCRIPTION, MODEL, fill
from harness.parts import registered
from harness.record.checkpoints import CheckpointDirectory
from harness.record.files import json_bytes, new_directory, storage_errors, write_durably
from harness.record.manifest import checkpoint_problems, read_manifest, read_trainer
from harness.record.progress import check_trainer
from harness.record.run_directory import read_identity, stored_config

TOKENIZER = "tokenizer.json"


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
        with _unless_deleted(checkpoint):
            export(given.run, checkpoint, to=given.to)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    how = f"{str(given.to)!r}" + (f", use={given.use}" if given.use else "")
    print(f"{checkpoint} is exported to {given.to}: harness.export.load_exported({how}) builds it")
    return EXIT_DONE


def find_checkpoint(run: Path, which: str) -> Path:
    """Return the checkpoint of a run that is called best, latest or by its step.

    Raises:
        CheckpointError: there is none.
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
        raise CheckpointError(f"{directory.path} has no {which} checkpoint; there are steps {found} (--from STEP)")
    return directory.path / wanted


@contextmanager
def _unless_deleted(checkpoint: Path) -> Iterator[None]:
    """Say so if what fails inside fails because the run, which goes on, has deleted the checkpoint."""
    try:
        yield
    except (CheckpointError, StorageError, ValueError) as error:
        if checkpoint.exists():
            raise
        raise CheckpointError(f"{checkpoint} was deleted by the run meanwhile. Start the same command again") from error


def export(run: Path, checkpoint: Path, *, to: Path) -> None:
    """Write the network of a checkpoint to a new folder; a pretrained one is in memory meanwhile.

    Raises:
        CheckpointError: the checkpoint is broken.
        ConfigError: the folder is there already, or the run's config.yaml is damaged.
        StorageError: it cannot be written.
    """
    problems = checkpoint_problems(checkpoint)
    if problems:
        raise CheckpointError(f"{checkpoint} is broken: {problems[0]}. Choose another with --from STEP")
    manifest, trainer = read_manifest(checkpoint), read_trainer(checkpoint)
    check_trainer(trainer, checkpoint, step=manifest.step)
    config = stored_config(run)
    if not config.model.is_known:
        advice = f"Type: harness export {run} --to {to} --use {(*config.use, 'FILE')[0]}"
        raise ConfigError(unknown_kind(config.model.kind, config.use, advice))
    described: dict[str, Any] = {
        "model": config.model.model_dump(mode="json"),
        **{key: trainer[key] for key in ("input_shape", "num_outputs", "step", "metrics", "harness", "preprocessing")},
    }
    if not config.model.is_ours:
        identity = read_identity(run)
        described |= {key: identity.get(key, []) for key in ("use", "facts")}
    if os.path.lexists(to):
        raise ConfigError(f"--to: {to} is there already; give the name of a new folder")
    with storage_errors("write", to), new_directory(to) as directory:
        live = TensorFiles(checkpoint, manifest.names("model"))
        averaged = TensorFiles(checkpoint, manifest.names("ema"), prefix="weight/")
        tensors: Mapping[str, Tensor] = ChainMap(averaged, live)  # type: ignore[arg-type]  # it is only read
        if config.model.is_of_transformers:
            config.model.write_export(directory, tensors, described)
        else:
            write_tensors(directory / MODEL, tensors)
            write_durably(directory / CONFIG, [json_bytes(described)])
        if trainer["tokenizer"] and not config.model.is_of_transformers:
            write_durably(directory / TOKENIZER, [trainer["tokenizer"].encode()])


def unknown_kind(kind: str, use: Sequence[str], advice: str) -> str:
    """Return what is said where nobody knows how to build a network."""
    return f"model.kind: {kind!r} is not built in; {', '.join(use) or 'a file of its user'} has brought it. {advice}"


def load_exported(directory: str | Path, *, use: Sequence[str] = ()) -> nn.Module:
    """Return the network of an exported folder, in evaluation mode, on the CPU.

    Args:
        use: files that register its kind, where that is not built in; the folder itself brings no code.
    """
    load_used(use, folder=Path.cwd(), is_typed=True)
    is_for_transformers = (Path(directory) / DESCRIPTION).is_file()
    described = json.loads((Path(directory) / (DESCRIPTION if is_for_transformers else CONFIG)).read_bytes())
    section: ModelSection = registered(keeps_unknown=True).validated("model", described["model"])
    if not section.is_known:
        files = [Path(file["file"]).name for file in described.get("use", [])[:1]]
        advice = f"Write load_exported({str(directory)!r}, use={files or ['FILE']}), and read that file before"
        raise ConfigError(unknown_kind(section.kind, files, advice))
    section = section.as_exported(Path(directory))
    sizes = {"input_shape": tuple(described["input_shape"]), "num_outputs": described["num_outputs"]}
    facts = {**described.get("facts", {}), **sizes}
    network = section.build(facts)
    if not section.is_of_transformers:
        fill(network, TensorFiles(Path(directory), [MODEL]), path=str(directory))
    return network.eval()


if __name__ == "__main__":
    sys.exit(main())
