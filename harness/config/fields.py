"""The types of a configuration's fields, and what every section of it is."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def _check_run_name(value: str) -> str:
    allowed = all(character.isascii() and (character.isalnum() or character in "._-") for character in value)
    if not (allowed and value and value[0].isalnum() and len(value) <= 64):
        raise ValueError("a run name has 1 to 64 of the characters A-Z a-z 0-9 . _ - and starts with a letter or digit")
    return value


_KEY = re.compile(r"(?<![0-9A-Za-z])(?:wandb_v\d+_\w+|(?:local-)?[0-9a-f]{40})(?![0-9A-Za-z])")


def looks_like_key(text: str) -> bool:
    """Return whether an API key of wandb may stand in a text; a git commit in full looks the same."""
    return _KEY.search(text) is not None


def without_keys(text: str) -> str:
    """Return a text with `(hidden)` in the place of whatever looks like an API key."""
    return _KEY.sub("(hidden)", text)


T = TypeVar("T")
V = TypeVar("V")
Number = BeforeValidator(_not_bool)
Int = Annotated[int, Number]
Float = Annotated[float, Number, Field(allow_inf_nan=False)]
PositiveInt = Annotated[Int, Field(ge=1)]
CountInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Probability = Annotated[Float, Field(ge=0, lt=1)]
RUN_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
"""What trackers know a run by; chosen by us, by a sweep or with WANDB_RUN_ID."""
RunName = Annotated[str, AfterValidator(_check_run_name)]
Mode = Literal["min", "max"]
ValueOrList = Annotated[
    Annotated[V, Tag("value")] | Annotated[tuple[T, ...], Tag("list")],
    Discriminator(lambda given: "list" if isinstance(given, list | tuple) else "value"),
]
NumberOrName = Annotated[
    Annotated[CountInt, Tag("number")] | Annotated[str, Tag("name")],
    Discriminator(lambda given: "name" if isinstance(given, str) else "number"),
]
OneOrEach = ValueOrList[T, T]
"""One value for all, or a list with one for each."""


class WrongKey(ValueError):
    """What is wrong with one key of a section, seen only when the whole section is looked at."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


class NoneOfSeveral(ValueError):
    """A value that none of several types takes; what they are, the schema says."""


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
