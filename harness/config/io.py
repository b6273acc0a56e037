"""YAML and dotted overrides to a RunConfig and back; every problem is gathered and raised once, as one ConfigError."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from harness import __version__
from harness.config.checks import batch_problems, contradictions
from harness.config.fields import Section
from harness.config.installed import extras_used, version_problems
from harness.config.problems import (
    Schema,
    dotted,
    nearest_name,
    problem_sentence,
    resolved,
    schema_of,
    shown,
    with_slots,
)
from harness.config.run_config import RunConfig
from harness.config.tracking import tracker_problems, tracking_problems
from harness.config.use import NOTHING_USED, STORED_USE, Used, load_used
from harness.config.yaml_reader import FLOAT, plain_data
from harness.errors import ConfigError
from harness.parts import Parts, parts_of, registered

__all__ = ["LoadedConfig", "dump_config", "load_config", "read_mapping", "refuse", "shown", "validated"]

M = TypeVar("M", bound=Section)
_MAX_BYTES = 2**18
_WRITTEN_BY = "# written by harness "
_TAGS = ("kind", "source")


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration, and a sentence for each thing that was changed without being asked for."""

    config: RunConfig
    notices: tuple[str, ...]
    used: Used = NOTHING_USED
    """The code that it brings."""
    parts: Parts | None = None
    """The kinds that it could name."""


def load_config(
    path: str | PathLike[str], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> LoadedConfig:
    """Return the configuration of a YAML file after `key=value` overrides such as `optim.peak_lr=3e-4`.

    Args:
        path: a UTF-8 file of at most 256 KiB that holds one mapping.
        overrides: a dotted key, `=` and a YAML value each; no two may set the same key. One that changes the `kind`
            or `source` of a section drops the file's keys that only the old one has; a notice names them.
        world_size: number of ranks, when a run is to start here: the global batch must divide over them, the directory
            of a pretrained model must be there (one that is there is looked at in any case), and this machine must
            have what the trackers need and no package that is too old; a notice names those that are newer than any
            that was tried.
    Raises:
        ConfigError: the file cannot be read, or something in it or in the overrides is wrong; the message has a
            line for every problem: dotted path, what was found, what is allowed.
    """
    raw, problems = read_mapping(path, example="configs/*.yaml", start="a section, such as run: {name: a}")
    settings = _settings(overrides, problems)
    given = settings.get(("use",))
    is_typed = given is not None  # on a command line, where files may be anywhere, as those of any command
    names = use_names(given if is_typed else raw.get("use"))
    if names and not is_typed and is_stored(path):
        refuse(path, [STORED_USE.format(path=path, use=json.dumps(names))])
    used = load_used(names, folder=Path.cwd() if is_typed else Path(path).parent, is_typed=is_typed)
    parts = parts_of(used.modules)
    schema = with_slots(schema_of(RunConfig), parts.schemas)
    notices = _override(raw, settings, problems, schema)
    config = validated(raw, RunConfig, path=path, problems=problems, parts=parts, schema=schema)
    problems += contradictions(config)
    problems += tracker_problems(config.tracking, parts.of("tracker"))
    sections = (config.model, config.data, config.task)
    problems += dict.fromkeys(
        problem
        for section in sections
        for problem in section.problems_here(config, must_be_there=world_size is not None)
    )
    if world_size is not None:
        too_old, newer = version_problems(extras_used(config))
        problems += batch_problems(config, world_size=world_size) + too_old
        notices += newer
        problems += tracking_problems(config.tracking)
    refuse(path, problems)
    return LoadedConfig(config, notices, used, parts)


def load_stored(path: str | PathLike[str]) -> RunConfig:
    """Return the configuration that a run directory holds; nothing is imported for it.

    A kind that this process does not know stays plain data, and what `use` names stays text.

    Raises:
        ConfigError: as `load_config`.
    """
    raw, problems = read_mapping(path, example="configs/*.yaml", start="a section, such as run: {name: a}")
    parts = registered(keeps_unknown=True)
    schema = with_slots(schema_of(RunConfig), parts.schemas)
    config = validated(raw, RunConfig, path=path, problems=problems, parts=parts, schema=schema)
    refuse(path, [*problems, *contradictions(config)])
    return config


def use_names(value: Any) -> list[str]:
    """Return what `use` names, as far as it is a list of texts; what else it is the configuration's model says."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def is_stored(path: str | PathLike[str]) -> bool:
    """Whether a configuration lies in a run directory, where the run has put it, or its job."""
    folder = Path(path).absolute().parent
    run = folder.parent if folder.name == "slurm" else folder
    return (run / "run.json").exists() or (run / "slurm" / "train.sbatch").exists()


def read_mapping(path: str | PathLike[str], *, example: str, start: str) -> tuple[dict[str, Any], list[str]]:
    """Return the mapping that a YAML file holds, beside a sentence for each thing that could not be taken over.

    Args:
        example: where such a file can be found, for the message that there is none.
        start: what such a file begins with, for the message that this one does not.
    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    raw, problems = plain_data(_read(Path(path), example=example), name=str(path))
    if not isinstance(raw, dict):
        found = "the file is empty" if raw is None else f"{shown(raw)} is not a mapping"
        refuse(path, problems or [f"{path}: {found}; start with {start}"])
    return raw, problems


def validated(
    raw: Any,
    model: type[M],
    *,
    path: str | PathLike[str],
    problems: Sequence[str],
    parts: Parts | None = None,
    schema: Schema | None = None,
) -> M:
    """Return plain data as a model.

    Args:
        problems: what was found in the file at `path` already; it is told first.
        parts: the kinds that it may name.
        schema: of the model with these kinds.
    Raises:
        ConfigError: a line for everything that the model does not allow.
    """
    try:
        return model.model_validate(raw, context=parts)
    except ValidationError as error:
        found = [problem_sentence(details, schema or schema_of(model)) for details in error.errors(include_url=False)]
    raise _gathered(path, [*problems, *found])


def refuse(path: str | PathLike[str], problems: Sequence[str]) -> None:
    """Raise the ConfigError that holds all problems of a file, if there are any."""
    if problems:
        raise _gathered(path, problems)


def dump_config(config: RunConfig) -> str:
    """Return ASCII YAML with every default written out, which `load_config` reads back to an equal configuration."""
    values = config.model_dump(mode="json")
    if not config.use:
        del values["use"]
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=110)
    return f"{_WRITTEN_BY}{__version__}\n{text}"


class _Dumper(yaml.SafeDumper):
    """Lists on one line, and quotes around texts that look like a number to `plain_data`."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _gathered(path: str | PathLike[str], problems: Sequence[str]) -> ConfigError:
    header = f"{len(problems)} problem{'s' * (len(problems) > 1)} in {path}"
    return ConfigError("\n  ".join([header, *problems, *other_version(Path(path))]))


def other_version(path: Path) -> list[str]:
    """Return what there is to say where a file with problems was written by another version of the harness."""
    try:
        with path.open(errors="replace") as file:
            first = file.readline(80).strip()
    except (OSError, ValueError):
        return []  # then that is the problem
    version = first.removeprefix(_WRITTEN_BY)
    if version in (first, __version__):
        return []
    return [
        f"harness {version} wrote this file, and this is {__version__}, which may not know all its keys; use {version}"
    ]


def _read(path: Path, *, example: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        siblings = [sibling.name for sibling in path.parent.glob("*.yaml")]
        nearest = nearest_name(path.name, siblings)
        kept = f"one of {example}" if "*" in example else example
        use = path.parent / nearest if nearest else f"{kept}, which `harness examples .` writes here"
        raise ConfigError(f"{path}: no such file; use {use}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"{path}: cannot be read ({error}); see ls -l {path}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: longer than {_MAX_BYTES:,} bytes; a configuration has some 40 lines")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start:,}; save it as UTF-8") from None


def _settings(overrides: Sequence[str], problems: list[str]) -> dict[tuple[str, ...], Any]:
    """Return the value of every dotted key that is overridden."""
    settings: dict[tuple[str, ...], Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        path = tuple(key.strip().split("."))
        wrong = [
            f"{dotted(*path)}: overridden twice, also by {dotted(*other)}=; keep one"
            for other in settings
            if path[: len(other)] == other[: len(path)]
        ]
        if not text.strip():
            wrong.append(f"{shown(override)}: not an override; write key=value, such as optim.peak_lr=3e-4")
        value, wrong = (None, wrong) if wrong else plain_data(text, name=dotted(*path), path=path)
        if not wrong:
            settings[path] = value
        problems += wrong
    return settings


def _override(
    raw: dict[str, Any], settings: dict[tuple[str, ...], Any], problems: list[str], schema: Schema
) -> tuple[str, ...]:
    """Set every override in `raw`; return a sentence for each kind that took keys of the file with it."""
    notices = tuple(_drop_old_keys(raw, settings, schema))
    for path, value in settings.items():
        _set(raw, path, value, problems, schema)
    return notices


def _section_schema(name: str, schema: Schema) -> Schema:
    """Return the JSON schema of a section of a configuration with its default; {} when there is no such section."""
    return resolved(schema["properties"].get(name, {}))


def _drop_old_keys(raw: dict[str, Any], settings: dict[tuple[str, ...], Any], schema: Schema) -> Iterator[str]:
    for (name, *rest), new in settings.items():
        discriminator = _section_schema(name, schema).get("discriminator", {})
        section = raw.get(name)
        if not isinstance(section, dict) or rest != [discriminator.get("propertyName")]:
            continue
        old, kinds = section.get(rest[0]), discriminator["mapping"]
        if not all(kind in list(kinds) for kind in (old, new)):
            continue
        old_keys, new_keys = (kinds[kind]["properties"] for kind in (old, new))
        gone = [k for k in section if k in old_keys and k not in new_keys]
        if gone:
            dropped = ", ".join(f"{key}: {shown(section.pop(key))}" for key in gone)
            yield f"{name}.{rest[0]}: {old} -> {new} drops {dropped}, which {new} does not have"


def _set(raw: dict[str, Any], path: tuple[str, ...], value: Any, problems: list[str], schema: Schema) -> None:
    section = raw
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            # Sections that may be left out start as their default kind, so that strategy.micro_batch=8 is enough.
            default = _section_schema(name, schema).get("default") or {} if depth == 1 else {}
            section[name] = {tag: default[tag] for tag in _TAGS if tag in default}
        section = section[name]
        if not isinstance(section, dict):
            parent = dotted(*path[:depth])
            problems.append(
                f"{dotted(*path)}: {parent} is {shown(section)}, which has no keys; set it whole, {parent}=..."
            )
            return
    section[path[-1]] = value
