"""The one door: which kinds of models, data, tasks and trackers there are, ours and those of a user's file.

`@harness.model("tower")` over a class or a function registers it, and a configuration then names it as it names ours.
The catalogue comes in by the same decorators: every `harness/catalogue/NAME/section.py` is imported when a kind is
first asked for.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar, Union

from pydantic import Field, TypeAdapter, ValidationError

from harness.config.fields import Section
from harness.config.problems import Schema, expanded
from harness.config.signature import SLOTS, UNKNOWN, section_of
from harness.errors import ConfigError

__all__ = ["Part", "Parts", "Section", "data", "model", "registered", "task", "tracker"]

T = TypeVar("T")
BUILT_IN = "built in"
CATALOGUE = "harness.catalogue"
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, eq=False)
class Part:
    """Something that was registered under a kind."""

    slot: str
    kind: str
    section: Any
    """The pydantic class of its keys; of a tracker the tracker itself."""
    origin: str
    """Where it comes from, for messages: `built in`, `my_parts.py line 12`, ..."""
    module: str
    """The name of the module that registered it."""

    @property
    def is_ours(self) -> bool:
        """Whether it is of the catalogue."""
        return self.module.startswith(f"{CATALOGUE}.")


class _Registry:
    """All that was registered in this process."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.used_modules: set[str] = set()
        """Modules that a configuration brought by `use`: their parts are for such configurations alone."""
        self.origin: str | None = None
        """Of what is registered now, where that is not a file that somebody wrote for it."""

    def add(self, part: Part) -> None:
        for other in list(self.parts):
            if (other.slot, other.kind) != (part.slot, part.kind):
                continue
            if other.is_ours and not part.is_ours:
                raise ConfigError(f"{part.origin}: the {part.slot} {part.kind!r} is {BUILT_IN}; choose another name")
            if other.module == part.module == "__main__":  # a cell of a notebook that was run again
                self.parts.remove(other)
            elif other.module == part.module:
                raise _two_of_one_name(other, part)
        self.parts.append(part)


_REGISTRY = _Registry()


def model(kind: str) -> Callable[[T], T]:
    """Register a network: an `nn.Module`, a function that returns one, or a section with `build(facts)`."""
    return _registers("model", kind, sys._getframe(1))


def data(kind: str) -> Callable[[T], T]:
    """Register rows: a torch `Dataset`, a function that returns one, or a section with `open(task, *, seed)`."""
    return _registers("data", kind, sys._getframe(1))


def task(kind: str) -> Callable[[T], T]:
    """Register a task: a class with `forward` and `loss`, a function that returns one, or a section."""
    return _registers("task", kind, sys._getframe(1))


def tracker(kind: str) -> Callable[[T], T]:
    """Register a tracker: a subclass of `harness.tracking.tracker.Tracker`."""
    return _registers("tracker", kind, sys._getframe(1))


def _registers(slot: str, kind: str, frame: FrameType) -> Callable[[T], T]:
    module = frame.f_globals.get("__name__", "__main__")
    is_ours = module.startswith(f"{CATALOGUE}.")
    origin = f"{Path(frame.f_code.co_filename).name} line {frame.f_lineno}"
    origin = BUILT_IN if is_ours else _REGISTRY.origin or origin
    names, own_names = frame.f_globals, dict(frame.f_locals)
    if not isinstance(kind, str):
        raise ConfigError(f'{origin}: write @harness.{slot}("NAME") with a name in brackets')
    if not _KIND.fullmatch(kind):
        raise ConfigError(f"{origin}: {kind!r} is no name of a {slot}; use letters, digits, - _ and . after a letter")

    def register(thing: T) -> T:
        if not is_ours:
            built_in()  # so that nobody takes their names
        where = f"{origin}: {getattr(thing, '__qualname__', type(thing).__name__)}"
        section = section_of(slot, kind, thing, where=where, module=module, names=names, own_names=own_names)
        _REGISTRY.add(Part(slot, kind, section, origin, module))
        return thing

    return register


def built_in() -> None:
    """Import the sections of the catalogue, one folder a family of kinds."""
    _import_sections(tuple(import_module(CATALOGUE).__path__))


@cache
def _import_sections(folders: tuple[str, ...]) -> None:
    for found in pkgutil.iter_modules(folders):
        if found.ispkg:
            import_module(f"{CATALOGUE}.{found.name}.section")


class Parts:
    """The kinds that a configuration may name, by slot.

    Args:
        keeps_unknown: of a run directory: a kind that is not here, or is another now, stays plain data.
    """

    def __init__(self, parts: Sequence[Part], *, keeps_unknown: bool = False) -> None:
        self.keeps_unknown = keeps_unknown
        self._by_slot: dict[str, dict[str, Part]] = {slot: {} for slot in SLOTS}
        for part in parts:
            other = self._by_slot[part.slot].setdefault(part.kind, part)
            if other is not part:
                raise _two_of_one_name(other, part)
        self._adapters: dict[str, TypeAdapter[Any]] = {}

    def of(self, slot: str) -> dict[str, Part]:
        """Return the parts of a slot by kind."""
        return self._by_slot[slot]

    def all_sections(self) -> list[Any]:
        """Return every section of a model, of data and of a task."""
        return [part.section for slot in UNKNOWN for part in self._by_slot[slot].values()]

    def find(self, slot: str, section: Any) -> Part | None:
        """Return the part that a section is of; None where it is of none that is known."""
        return self._by_slot[slot].get(getattr(section, SLOTS[slot].tag, ""))

    def validated(self, slot: str, value: Any) -> Any:
        """Return plain data as the section of its kind.

        Raises:
            ValidationError: it is none; with the locations of a union of all kinds.
        """
        tag = SLOTS[slot].tag
        kind = value.get(tag) if isinstance(value, dict) else None
        if not self.keeps_unknown or not isinstance(kind, str):
            return self._adapter(slot).validate_python(value)
        part = self._by_slot[slot].get(kind)
        if part is None:
            return UNKNOWN[slot].model_validate(value)
        try:
            return self._adapter(slot).validate_python(value)
        except ValidationError:
            if part.is_ours:
                raise
            return UNKNOWN[slot].model_validate(value)

    def _adapter(self, slot: str) -> TypeAdapter[Any]:
        if slot not in self._adapters:
            classes = tuple(dict.fromkeys(part.section for part in self._by_slot[slot].values()))
            union = Annotated[Union[classes], Field(discriminator=SLOTS[slot].tag)]  # type: ignore[valid-type]  # noqa: UP007
            self._adapters[slot] = TypeAdapter(union)
        return self._adapters[slot]

    @cached_property
    def schemas(self) -> dict[str, Schema]:
        """The JSON schema of each slot of a configuration."""
        found = {slot: expanded(self._adapter(slot).json_schema()) for slot in SLOTS if SLOTS[slot].tag}
        for slot, schema in found.items():
            own: dict[str, list[str]] = {}
            for part in self._by_slot[slot].values():
                if not part.is_ours:
                    own.setdefault(part.origin, []).append(part.kind)
            of_us = sorted(part.kind for part in self._by_slot[slot].values() if part.is_ours)
            schema["discriminator"]["origins"] = {BUILT_IN: of_us, **own} if own else {}
        return found


def registered(*, keeps_unknown: bool = False) -> Parts:
    """Return all kinds that this process knows."""
    built_in()
    return _parts(tuple(_REGISTRY.parts), keeps_unknown)


def parts_of(modules: Collection[str]) -> Parts:
    """Return the kinds that a configuration may name that uses these modules.

    Raises:
        ConfigError: two parts of one name.
    """
    built_in()
    hidden = _REGISTRY.used_modules - set(modules)
    return _parts(tuple(part for part in _REGISTRY.parts if part.module not in hidden), False)


@cache
def _parts(parts: tuple[Part, ...], keeps_unknown: bool) -> Parts:
    return Parts(parts, keeps_unknown=keeps_unknown)


def number_registered() -> int:
    """Return how many parts were registered until now, those of the catalogue first of all."""
    built_in()
    return len(_REGISTRY.parts)


def modules_registered(since: int) -> set[str]:
    """Return the modules that registered parts after so many."""
    return {part.module for part in _REGISTRY.parts[since:]}


def mark_used(modules: Collection[str]) -> None:
    """Keep the parts of these modules for configurations that use them."""
    _REGISTRY.used_modules |= set(modules)


def forget(modules: Collection[str]) -> None:
    """Take back all that these modules have registered."""
    _REGISTRY.parts = [part for part in _REGISTRY.parts if part.module not in modules]
    _REGISTRY.used_modules -= set(modules)
    _parts.cache_clear()


@contextmanager
def coming_from(origin: str | None) -> Iterator[None]:
    """Say of what is registered inside where it comes from."""
    before, _REGISTRY.origin = _REGISTRY.origin, origin
    try:
        yield
    finally:
        _REGISTRY.origin = before


def section_class(slot: str, kind: str, module: str) -> Any:
    """Return the section that a module has registered under a kind, importing it if need be."""
    import_module(module)
    return next(part.section for part in _REGISTRY.parts if (part.slot, part.kind, part.module) == (slot, kind, module))


def _two_of_one_name(first: Part, second: Part) -> ConfigError:
    return ConfigError(
        f"there are two parts for {first.slot} {first.kind!r}: {first.origin} and {second.origin}; rename one of them"
    )
