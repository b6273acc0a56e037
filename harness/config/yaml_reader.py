"""One YAML document to plain data, by rules that leave no value to guess and no input to run or blow up.

Plain YAML 1.2 without octal: `no`, `010`, `1:30:00` and `2024-01-01` are texts, and `1e-3` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from harness.config.problems import dotted, shown

FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?\Z")
"""What `plain_data` takes for a fractional number where it stands without quotes."""

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_UNUSABLE = re.compile(r"[\x00\ud800-\udfff]")
_MAX_DEPTH = 16  # a configuration nests 3 deep; without a limit, 1,000 brackets end in a RecursionError


def plain_data(text: str, *, name: str, path: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """Return one YAML document as plain data, beside a sentence for each thing that could not be taken over.

    Args:
        text: nothing, or one document without tags, anchors or aliases.
        name: what the text is called in the sentence about a place in it.
        path: the keys that lead to the document; they stand before its own keys in sentences, and count as depth.
    Returns:
        dict, list, str, int, float, bool and None only; the whole is None when the text is empty or is not such YAML.
        Of a key given twice, which is a problem too, the last value.
    """
    problems: list[str] = []
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    try:
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            return None, problems
        value = _value(events, next(events), path, problems)
        next(events)
        if not isinstance(after := next(events), yaml.StreamEndEvent):
            raise _refusal(after, "a second document starts; write one")
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: "\UFFFFFFFF", 5,000 digits
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "not YAML"
        problems.append(f"{name}: {place}: {getattr(error, 'problem', None) or ' '.join(str(error).split())}")
        return None, problems
    return value, problems


def _value(events: Iterator[Any], event: Any, path: tuple[str, ...], problems: list[str]) -> Any:
    """Return what starts with `event`, and take its other events; this is the only place where values are made."""
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
            items.append(_value(events, event, (*path, str(len(items))), problems))
        return items
    text = _text(event)
    if not event.implicit[0]:  # quoted
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    return int(text) if _INTEGER.match(text) else float(text) if FLOAT.match(text) else text


def _mapping(events: Iterator[Any], path: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key, line = _text(event), event.start_mark.line + 1
        if key in lines:
            problems.append(f"{dotted(*path, key)}: given twice, in lines {lines[key]} and {line}; keep one")
        lines[key] = line
        values[key] = _value(events, next(events), (*path, key), problems)
    return values


def _text(event: Any) -> str:
    if not isinstance(event, yaml.ScalarEvent) or event.tag or event.anchor:
        raise _refusal(event, "a key is one word, without tag or anchor")
    if _UNUSABLE.search(event.value):
        raise _refusal(event, f"{shown(event.value)} has a NUL or half a character in it")
    return event.value


def _refusal(event: Any, reason: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=event.start_mark)
