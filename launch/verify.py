"""`harness verify RUN`: read every byte of every checkpoint and say which are what was written."""

from collections.abc import Iterator
from pathlib import Path

from harness.errors import CheckpointError, ConfigError
from harness.record.checkpoints import CheckpointDirectory
from harness.record.manifest import checkpoint_problems, read_manifest


def checkpoint_lines(run: Path) -> Iterator[str]:
    """Yield a line for each checkpoint of a run, newest first, as soon as it was read, and one for those set aside.

    Changes nothing.

    Raises:
        ConfigError: `run` is no run directory.
        CheckpointError: at the end, if a checkpoint is broken or of another version, or there is none.
    """
    path = run / "checkpoints"
    if not path.is_dir():
        raise ConfigError(f"{run} is not a run directory: it has no checkpoints/. Give one such as runs/mnist-cnn")
    directory = CheckpointDirectory(path)
    checkpoints = directory.steps()
    broken = 0
    foreign: list[str] = []
    for checkpoint in checkpoints:
        try:
            problems = checkpoint_problems(checkpoint)
        except CheckpointError as error:  # the others are told all the same
            foreign.append(str(error.args[0]))
            yield f"{checkpoint.name}  of another version of the harness, not read"
            continue
        if not checkpoint.exists():
            yield f"{checkpoint.name}  deleted by the run meanwhile"
            continue
        broken += bool(problems)
        yield f"{checkpoint.name}  {'; '.join(problems) or _whole(directory, checkpoint)}"
    set_aside = directory.num_in_quarantine()
    if set_aside:
        yield f"quarantine/  {set_aside} set aside at earlier starts; why: {run / 'events.jsonl'}"
    if foreign:
        raise CheckpointError("\n".join(foreign))
    if broken or not checkpoints:
        what = f"{broken} of {len(checkpoints)} checkpoints are broken" if checkpoints else "there is no checkpoint"
        hint = "the next start sets them aside and goes on from the newest whole one"
        raise CheckpointError(f"{what} in {path}" + (f"; {hint}" if broken < len(checkpoints) else ""))


def _whole(directory: CheckpointDirectory, checkpoint: Path) -> str:
    files = read_manifest(checkpoint).files
    marked = {"LATEST": directory.newest(), "BEST": directory.best()}
    marks = [mark for mark, name in marked.items() if name == checkpoint.name]
    num_bytes = sum(entry.size for entry in files)
    return "  ".join([f"whole: {len(files)} files, {num_bytes:,} bytes", *marks])
