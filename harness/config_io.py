"""YAML and dotted overrides to a RunConfig and back; every problem is gathered and raised once, as one ConfigError."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from harness.config import RunConfig, batch_problems
from harness.errors import ConfigError

_MAX_BYTES = 2**20
_MAX_DEPTH = 16  # a configuration nests 3 deep; without a limit, 1,000 brackets end in a RecursionError
_MAX_SHOWN_CHARACTERS = 60
_TAGS = ("kind", "source")

# Plain YAML 1.2 without octal: `no`, `010`, `1:30:00` and `2024-01-01` are texts, and `1e-3` is a number.
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z")

_WORDS = {
    "integer": "a whole number",
    "number": "a finite number",
    "string": "a text",
    "boolean": "true or false",
    "null": "null",
}
_BOUNDS = {  # pydantic writes the short names where a validator of ours runs before its own
    **dict.fromkeys(("ge", "minimum"), "at least"),
    **dict.fromkeys(("gt", "exclusiveMinimum"), "above"),
    **dict.fromkeys(("le", "maximum"), "at most"),
    **dict.fromkeys(("lt", "exclusiveMaximum"), "below"),
}

Schema = dict[str, Any]


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration, and a sentence for each thing that was changed without being asked for."""

    config: RunConfig
    notices: tuple[str, ...]


def load_config(
    path: str | PathLike[str], overrides: Sequence[str] = (), *, world_size: int | None = None
) -> LoadedConfig:
    """Return the configuration of a YAML file after `key=value` overrides such as `optim.peak_lr=3e-4`.

    Args:
        path: a UTF-8 file of at most 1 MiB that holds one mapping.
        overrides: a dotted key, `=` and a YAML value each; no two may set the same key. One that changes the `kind`
            or `source` of a section drops the file's keys that only the old one has; a notice names them.
        world_size: number of ranks; when given, the global batch must divide over them.
    Raises:
        ConfigError: the file cannot be read, or something in it or in the overrides is wrong; the message has a
            line for every problem: dotted path, what was found, what is allowed.
    """
    problems: list[str] = []
    raw = _parse(_read(Path(path)), str(path), (), problems)
    if not isinstance(raw, dict):
        found = "the file is empty" if raw is None else f"{shown(raw)} is not a mapping"
        raise _gathered(path, problems or [f"{path}: {found}; start with a section, such as run: {{name: a}}"])
    notices = _override(raw, overrides, problems)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        problems += [_problem(details) for details in error.errors(include_url=False)]
        raise _gathered(path, problems) from None
    if world_size is not None:
        problems += batch_problems(config, world_size=world_size)
    if problems:
        raise _gathered(path, problems)
    return LoadedConfig(config, notices)


def dump_config(config: RunConfig) -> str:
    """Return ASCII YAML with every default written out, which `load_config` reads back to an equal configuration."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Lists on one line, and quotes around texts that look like a number to `_plain`."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def shown(value: Any) -> str:
    """Return a value as messages show it: on one line of at most 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[: _MAX_SHOWN_CHARACTERS - 3]}..."


def _gathered(path: str | PathLike[str], problems: Sequence[str]) -> ConfigError:
    header = f"{len(problems)} problem{'s' * (len(problems) > 1)} in {path}"
    return ConfigError("\n  ".join([header, *problems]))


# ---------------------------------------------------------------- text to plain data


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        siblings = [sibling.name for sibling in path.parent.glob("*.yaml")]
        near = difflib.get_close_matches(path.name, siblings, n=1)
        use = path.parent / near[0] if near else "one of configs/*.yaml"
        raise ConfigError(f"{path}: no such file; use {use}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"{path}: cannot be read ({error}); see ls -l {path}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: longer than {_MAX_BYTES:,} bytes; a configuration has some 40 lines")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start:,}; save it as UTF-8") from None


def _parse(text: str, name: str, path: tuple[str, ...], problems: list[str]) -> Any:
    """Return the plain data of one YAML document; what cannot be taken over goes to `problems`."""
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = _plain(events, next(events), path, problems)
        next(events)
        if not isinstance(after := next(events), yaml.StreamEndEvent):
            raise _refusal(after, "a second document starts; write one")
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: "\UFFFFFFFF", 5,000 digits
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "not YAML"
        problems.append(f"{name}: {place}: {getattr(error, 'problem', None) or ' '.join(str(error).split())}")
        return None
    return value


def _plain(events: Iterator[Any], event: Any, path: tuple[str, ...], problems: list[str]) -> Any:
    """Return what starts with `event` as dict, list, str, int, float, bool or None; nothing else is ever made."""
    if event.anchor:  # also every alias
        raise _refusal(event, "anchors and aliases (& and *) are not read; write the value itself")
    if event.tag:
        raise _refusal(event, "tags (!name) are not read; write the plain value")
    if len(path) > _MAX_DEPTH:
        raise _refusal(event, f"nested more than {_MAX_DEPTH} deep")
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, path, problems)
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_plain(events, event, (*path, str(len(items))), problems))
        return items
    text = _text(event)
    if not event.implicit[0]:  # quoted
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    return int(text) if _INTEGER.match(text) else float(text) if _FLOAT.match(text) else text


def _mapping(events: Iterator[Any], path: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key, line = _text(event), event.start_mark.line + 1
        if key in lines:
            problems.append(f"{_dotted(*path, key)}: given twice, in lines {lines[key]} and {line}; keep one")
        lines[key] = line
        values[key] = _plain(events, next(events), (*path, key), problems)
    return values


def _text(event: Any) -> str:
    if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
        raise _refusal(event, "a key is one word, without tag or anchor")
    if _UNUSABLE.search(event.value):
        raise _refusal(event, f"{shown(event.value)} has a NUL or half a character in it")
    return event.value


def _refusal(event: Any, reason: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=event.start_mark)


def _dotted(*path: str | int) -> str:
    parts = [str(part) for part in path]
    return ".".join(part if re.fullmatch(r"[\w-]{1,60}", part) else shown(part) for part in parts)


# ---------------------------------------------------------------- overrides


def _override(raw: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> tuple[str, ...]:
    """Set every override in `raw`; return a sentence for each kind that took keys of the file with it."""
    settings: dict[tuple[str, ...], Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        path = tuple(key.strip().split("."))
        wrong = [
            f"{_dotted(*path)}: overridden twice, also by {_dotted(*other)}=; keep one"
            for other in settings
            if path[: len(other)] == other[: len(path)]
        ]
        if not text.strip():
            wrong.append(f"{shown(override)}: not an override; write key=value, such as optim.peak_lr=3e-4")
        value = None if wrong else _parse(text, _dotted(*path), path, wrong)
        if not wrong:
            settings[path] = value
        problems += wrong
    notices = tuple(_drop_old_keys(raw, settings))
    for path, value in settings.items():
        _set(raw, path, value, problems)
    return notices


def _drop_old_keys(raw: dict[str, Any], settings: dict[tuple[str, ...], Any]) -> Iterator[str]:
    for (name, *rest), new in settings.items():
        discriminator = _field(name).get("discriminator", {})
        section = raw.get(name)
        if not isinstance(section, dict) or rest != [discriminator.get("propertyName")]:
            continue
        old, kinds = section.get(rest[0]), discriminator["mapping"]
        if not all(kind in list(kinds) for kind in (old, new)):
            continue
        old_keys, new_keys = (_resolved({"$ref": kinds[kind]})["properties"] for kind in (old, new))
        gone = [k for k in section if k in old_keys and k not in new_keys]
        if gone:
            dropped = ", ".join(f"{key}: {shown(section.pop(key))}" for key in gone)
            yield f"{name}.{rest[0]}: {old} -> {new} drops {dropped}, which {new} does not have"


def _set(raw: dict[str, Any], path: tuple[str, ...], value: Any, problems: list[str]) -> None:
    section = raw
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            # Sections that may be left out start as their default kind, so that strategy.micro_batch=8 is enough.
            default = _field(name).get("default") or {} if depth == 1 else {}
            section[name] = {tag: default[tag] for tag in _TAGS if tag in default}
        section = section[name]
        if not isinstance(section, dict):
            parent = _dotted(*path[:depth])
            problems.append(
                f"{_dotted(*path)}: {parent} is {shown(section)}, which has no keys; set it whole, {parent}=..."
            )
            return
    section[path[-1]] = value


# ---------------------------------------------------------------- what pydantic found, in our words


def _problem(details: Any) -> str:
    """Return `path: found, wanted` for one entry of `ValidationError.errors()`."""
    path, keys, field = _locate(details["loc"])
    kind, found = details["type"], details["input"]
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tagged = _resolved(field)["discriminator"]
        tag, field = tagged["propertyName"], {"enum": list(tagged["mapping"])}
        path = f"{path}.{tag}"
        kind, found = (kind, found[tag]) if tag in found else ("missing", None)
    hints: list[str] = []
    if kind == "extra_forbidden":
        text, hints = "unknown key", [*_nearest(details["loc"][-1], keys), f"allowed: {', '.join(keys)}"]
    elif kind == "missing":
        text = f"missing; wanted: {_wanted(field)}"
    elif kind == "value_error":
        text = str(details["ctx"]["error"])
        text = text if isinstance(found, dict) else f"{shown(found)} is refused: {text}"
    else:
        text, hints = f"{shown(found)} is not {_wanted(field)}", _nearest(found, _resolved(field).get("enum") or ())
        if kind == "string_type":
            hints = ["""write what looks like something else in quotes, on a command line '"..."'"""]
    return f"{path}: {text}" + (f" ({'; '.join(hints)})" if hints else "")


def _locate(loc: Sequence[str | int]) -> tuple[str, list[str], Schema]:
    """Return the dotted path of a pydantic location, the keys allowed beside its last one, and the schema there."""
    parts: list[str | int] = []
    keys: dict[Any, Schema] = {}
    schema = _schema()
    for step in loc:
        section = _resolved(schema)
        if "discriminator" in section:  # pydantic names the kind in the location; the file does not
            schema = {"$ref": section["discriminator"]["mapping"][step]}
            continue
        parts.append(step)
        keys = {**section.get("properties", {}), **dict(enumerate(section.get("prefixItems", [])))}
        schema = keys[step] if step in keys else section.get("items") or {}
    return _dotted(*parts) or "configuration", [str(key) for key in keys], schema


def _wanted(schema: Schema) -> str:
    """Return in plain words what a JSON schema allows, such as `a whole number, at least 1, or null`."""
    if "anyOf" in schema:
        return ", or ".join(_wanted(option) for option in schema["anyOf"])
    schema = _resolved(schema)
    if "discriminator" in schema:
        tag, kinds = schema["discriminator"]["propertyName"], schema["discriminator"]["mapping"]
        return f"a section whose {tag} is one of {', '.join(kinds)}"
    if "enum" in schema:
        return ("one of " if len(schema["enum"]) > 1 else "") + ", ".join(map(str, schema["enum"]))
    if "properties" in schema:
        return f"a section with {', '.join(schema.get('required') or schema['properties'])}"
    if schema["type"] == "array":
        size = f" of {schema['minItems']}" if "minItems" in schema else ""
        size += " or more" if size and "maxItems" not in schema else ""
        return f"a list{size}, each {_wanted(schema.get('items') or schema['prefixItems'][0])}"
    return ", ".join([_WORDS[schema["type"]], *(f"{_BOUNDS[key]} {schema[key]}" for key in schema if key in _BOUNDS)])


def _nearest(found: Any, options: Iterable[Any]) -> list[str]:
    names = difflib.get_close_matches(str(found), map(str, options), n=1)
    return [f"nearest: {name}" for name in names]


@cache
def _schema() -> Schema:
    return RunConfig.model_json_schema()


def _field(section: str) -> Schema:
    schema: Schema = _schema()["properties"].get(section, {})
    return {**_resolved(schema), **schema}


def _resolved(schema: Schema) -> Schema:
    """Return a JSON schema without its `null` alternative, reference and `const`."""
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        schema = options[0]
    if "$ref" in schema:
        schema = _schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    return {**schema, "enum": [schema["const"]]} if "const" in schema else schema
