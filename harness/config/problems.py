"""What is wrong in a configuration, in our words: the path, what was found there, what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel

from harness.config.fields import NoneOfSeveral, WrongKey, without_keys

_MAX_SHOWN_CHARACTERS = 60
_WORDS = {
    "integer": "a whole number",
    "number": "a finite number",
    "string": "a text",
    "boolean": "true or false",
    "null": "null",
    "object": "an object",
}
_BOUNDS = {  # pydantic writes the short names where a validator of ours runs before its own
    **dict.fromkeys(("ge", "minimum"), "at least"),
    **dict.fromkeys(("gt", "exclusiveMinimum"), "above"),
    **dict.fromkeys(("le", "maximum"), "at most"),
    **dict.fromkeys(("lt", "exclusiveMaximum"), "below"),
}

Schema = dict[str, Any]


def shown(value: Any) -> str:
    """Return a value as messages show it: on one line of at most 60 characters, keys hidden."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = without_keys(repr(value))
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[: _MAX_SHOWN_CHARACTERS - 3]}..."


def dotted(*path: str | int) -> str:
    """Return a path as messages show it: its parts with dots between them, quoted where a part is not one word."""
    parts = [str(part) for part in path]
    return ".".join(part if re.fullmatch(r"[\w-]{1,60}", part) else shown(part) for part in parts)


def nearest_name(found: str, names: Iterable[str]) -> str | None:
    """Return the name that `found` most likely is a misspelling of, if it resembles one."""
    return next(iter(difflib.get_close_matches(found, names, n=1)), None)


def problem_sentence(details: Any, schema: Schema) -> str:
    """Return `path: found, wanted` for one entry of a model's `ValidationError.errors()`."""
    path, keys, field = _locate(details["loc"], schema)
    origins: list[str] = []
    no_part_of_ones_own = False
    kind, found = details["type"], details["input"]
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tagged = resolved(field)["discriminator"]
        tag, field = tagged["propertyName"], {"enum": list(tagged["mapping"])}
        path = f"{path}.{tag}"
        kind, found = (kind, found[tag]) if tag in found else ("missing", None)
        origins = [f"{origin}: {', '.join(kinds)}" for origin, kinds in tagged.get("origins", {}).items()]
        no_part_of_ones_own = tagged.get("origins") == {}
    hints: list[str] = []
    if kind == "extra_forbidden":
        hints = _kinds_hint(details["loc"], schema) or _nearest_hint(details["loc"][-1], keys)
        text, hints = "unknown key", [*hints, f"allowed: {', '.join(keys)}"]
    elif kind == "missing":
        text = f"missing; wanted: {_wanted(field)}"
    elif kind == "value_error" and not isinstance(details["ctx"]["error"], NoneOfSeveral):
        error = details["ctx"]["error"]
        if isinstance(error, WrongKey):
            path, text = f"{path}.{error.key}", error.problem
        else:
            text = str(error) if isinstance(found, dict) else f"{shown(found)} is refused: {error}"
    else:
        text, hints = f"{shown(found)} is not {_wanted(field)}", _nearest_hint(found, resolved(field).get("enum") or ())
        if kind == "string_type":
            hints = ["""write what looks like something else in quotes, on a command line '"..."'"""]
        hints += origins
        if no_part_of_ones_own and not hints:
            hints = ["built in, all of them; one of yours comes by use: [FILE.py]"]
    return f"{path}: {text}" + (f" ({'; '.join(hints)})" if hints else "")


def _locate(loc: Sequence[str | int], schema: Schema) -> tuple[str, list[str], Schema]:
    """Return the dotted path of a pydantic location, the keys allowed beside its last one, and the schema there."""
    parts: list[str | int] = []
    keys: dict[Any, Schema] = {}
    for step in loc:
        section = resolved(schema)
        if "discriminator" in section:  # pydantic names the kind in the location; the file does not
            schema = section["discriminator"]["mapping"][step]
            continue
        if "oneOf" in section:  # fields.ValueOrList
            value, several = section["oneOf"]
            schema = value if step == "value" else several
            if step == "value" and several.get("items") != value:  # a list is not of such values
                schema = {"anyOf": [value, several], "enum": resolved(value).get("enum", [])}
            continue
        parts.append(step)
        keys = {**section.get("properties", {}), **dict(enumerate(section.get("prefixItems", [])))}
        schema = keys[step] if step in keys else section.get("items") or section.get("additionalProperties") or {}
        schema = schema if isinstance(schema, dict) else {}
    return dotted(*parts) or "configuration", [str(key) for key in keys], schema


def _wanted(schema: Schema) -> str:  # noqa: PLR0911  # one for each kind of schema
    """Return in plain words what a JSON schema allows, such as `a whole number, at least 1, or null`."""
    if "anyOf" in schema:
        return ", or ".join(_wanted(option) for option in schema["anyOf"])
    schema = resolved(schema)
    if "discriminator" in schema:
        tag, kinds = schema["discriminator"]["propertyName"], schema["discriminator"]["mapping"]
        return f"a section whose {tag} is one of {', '.join(kinds)}"
    if "oneOf" in schema:  # fields.ValueOrList
        return ", or ".join(_wanted(option) for option in schema["oneOf"])
    if "enum" in schema:
        return ("one of " if len(schema["enum"]) > 1 else "") + ", ".join(map(str, schema["enum"]))
    if "properties" in schema:
        return f"a section with {', '.join(schema.get('required') or schema['properties'])}"
    if isinstance(each := schema.get("additionalProperties"), dict) and each:
        return f"a section with {_wanted(each)} for each name"
    if "type" not in schema:
        return "a value"
    if schema["type"] == "array":
        size = f" of {schema['minItems']}" if "minItems" in schema else ""
        size += " or more" if size and "maxItems" not in schema else ""
        item: Schema = schema.get("items") or next(iter(schema.get("prefixItems", [])), {})
        return f"a list{size}" + (f", each {_wanted(item)}" if item else "")
    return ", ".join([_WORDS[schema["type"]], *(f"{_BOUNDS[key]} {schema[key]}" for key in schema if key in _BOUNDS)])


def _nearest_hint(found: Any, options: Iterable[Any]) -> list[str]:
    name = nearest_name(str(found), map(str, options))
    return [f"nearest: {name}"] if name else []


def _kinds_hint(loc: Sequence[str | int], schema: Schema) -> list[str]:
    """Return which other kinds of the section an unknown key is one of."""
    path, _, parent = _locate(loc[:-2], schema)  # without the key and the kind it was looked for in
    tagged: Schema = resolved(parent).get("discriminator", {"mapping": {}})
    kinds = [kind for kind, section in tagged["mapping"].items() if loc[-1] in section["properties"]]
    return [f"{path}.{tagged['propertyName']}={' or '.join(kinds)} has it"] if kinds else []


@cache
def schema_of(model: type[BaseModel]) -> Schema:
    """Return the JSON schema of a configuration, with what a reference refers to in the place of each reference."""
    return expanded(model.model_json_schema())


def with_slots(schema: Schema, slots: Mapping[str, Schema]) -> Schema:
    """Return the schema of a configuration with those of all kinds in the place of its slots."""
    properties = {name: {**found, **slots.get(name, {})} for name, found in schema["properties"].items()}
    return {**schema, "properties": properties}


def expanded(schema: Schema) -> Schema:
    """Return a JSON schema with what a reference refers to in the place of each reference."""
    definitions = schema.pop("$defs", {})

    def replaced(node: Any) -> Any:
        if isinstance(node, list):
            return [replaced(item) for item in node]
        if isinstance(node, str) and node.startswith("#/$defs/"):  # also the kinds of a discriminator
            return replaced(definitions[node.removeprefix("#/$defs/")])
        if not isinstance(node, dict):
            return node
        rest = {key: replaced(item) for key, item in node.items() if key != "$ref"}
        return {**replaced(node["$ref"]), **rest} if "$ref" in node else rest

    result: Schema = replaced(schema)
    return result


def resolved(schema: Schema) -> Schema:
    """Return a JSON schema without its `null` alternative and its `const`."""
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) == 1:
        schema = {**schema, **options[0]}
    return {**schema, "enum": [schema["const"]]} if "const" in schema else schema
