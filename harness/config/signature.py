"""A section from the signature of a class or a function: its parameters are the keys, as its annotations say."""

from __future__ import annotations

import functools
import inspect
import keyword
import typing
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

from pydantic import ValidationError, create_model

from harness.config.annotations import annotation_of, can_be_read, can_be_written, shown, strict
from harness.config.data import TWO_COLLATES, DataSection, DatasetSection, UnknownData
from harness.config.fields import Section
from harness.config.slots import KnownRows, ModelSection, TaskSection, UnknownModel, UnknownTask
from harness.errors import ConfigError, DataError
from harness.own_code import told

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.config.run_config import RunConfig
    from harness.rows.splits import DataSplits
    from harness.tasks.base import TaskLoss

FACTS = ("channels", "height", "width", "classes", "vocabulary", "features", "outputs")
"""What data may say of themselves under a name that a parameter of a network can bear."""
SPLIT = "split"
"""The parameter of a data part that is no key: it is asked for `train` and for `validation`."""
UNKNOWN: dict[str, Any] = {"model": UnknownModel, "data": UnknownData, "task": UnknownTask}


@dataclass(frozen=True)
class Plain:
    """A class or a function that makes a part, and what is known of it."""

    make: Callable[..., Any]
    slot: str
    kind: str
    where: str
    """Its place and name, for messages."""
    module: str
    keys: tuple[str, ...]
    has_split: bool
    facts: tuple[str, ...]
    """Keys without a default that bear the name of a fact."""

    def made(self, values: Mapping[str, Any], **more: Any) -> Any:
        """Return what it makes.

        Raises:
            ConfigError, of rows DataError: it raises.
        """
        try:
            return self.make(**values, **more)
        except Exception as error:
            kind = DataError if self.slot == "data" else ConfigError
            text = f"{SLOTS[self.slot].path}: {self.kind} ({self.where}) raised {told(error)}"
            raise kind(text) from error


class Made:
    """A section whose class is made here, and so cannot be pickled by its name."""

    _registered: ClassVar[tuple[str, str, str]]
    """Its slot, its kind, and the module that has registered it."""

    def __reduce__(self) -> Any:
        return _empty, self._registered, self.__getstate__()


def _empty(slot: str, kind: str, module: str) -> Any:
    from harness.parts import section_class

    found = section_class(slot, kind, module)
    return found.__new__(found)


class OwnModel(Made, ModelSection):
    """The network of a user's class or function."""

    plain: ClassVar[Plain]

    @property
    def facts_wanted(self) -> tuple[str, ...]:
        """Keys that may be left to the data."""
        return self.plain.facts

    def with_facts(self, facts: Mapping[str, Any]) -> tuple[ModelSection, list[str]]:
        """Return this section after it has taken what it leaves to the data, and a sentence for what it took."""
        taken, problems = {}, []
        for name in self.plain.facts:
            value, path = getattr(self, name), f"model.{name}"
            if name in facts and value is None:
                taken[name] = facts[name]
            elif name in facts and value != facts[name]:
                problems.append(f"{path}: {value!r}, but the data say {facts[name]!r}; leave it out, or mend the data")
            elif value is None:
                said = {fact: facts[fact] for fact in FACTS if fact in facts}
                list_of = ", ".join(f"{fact} {value}" for fact, value in said.items())
                there = f"they say {list_of}" if said else "they say nothing"
                problems.append(f"{path}: missing, and the data do not say it ({there}); set {path}")
        if problems:
            raise ConfigError("\n  ".join(problems))
        if not taken:
            return self, []
        try:
            found = type(self).model_validate({**self.model_dump(mode="json"), **taken})
        except ValidationError as error:
            shown = "; ".join(f"model.{name}: {value!r}" for name, value in taken.items())
            raise ConfigError(
                f"{shown}: what the data say is not what {self.plain.where} takes ({error.errors()[0]['msg']})"
            ) from error
        return found, [f"model.{name}: {value}, from the data" for name, value in taken.items()]

    def build(self, facts: Mapping[str, Any]) -> nn.Module:
        from torch import nn

        section, _ = self.with_facts(facts)
        network = self.plain.made({key: getattr(section, key) for key in self.plain.keys})
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"model.kind: {self.kind} ({self.plain.where}) makes a {type(network).__name__}; a torch.nn.Module is "
                "wanted"
            )
        return network


class OwnData(Made, DatasetSection):
    """The rows of a user's class or function."""

    plain: ClassVar[Plain]

    def open(self, task: TaskSection, *, seed: int) -> DataSplits:
        from harness.rows.own import own_splits

        make = functools.partial(self.plain.made, {key: getattr(self, key) for key in self.plain.keys})
        splits: DataSplits = own_splits(
            make,
            has_split=self.plain.has_split,
            validation_fraction=self.validation_fraction,
            seed=seed,
            workers=self.workers,
            num_outputs=task.num_outputs,
            pad=self.collate,
            keys=("inputs", "targets") if task.is_ours else (),
        )
        return splits

    def problems(self, config: RunConfig) -> list[str]:
        made = self.plain.make
        if self.collate is None or not (inspect.isclass(made) and hasattr(made, "collate")):
            return []
        return [TWO_COLLATES.format(name=self.source)]


class OwnTask(Made, TaskSection):
    """The task of a user's class or function."""

    plain: ClassVar[Plain]

    def _made(self) -> Any:
        return self.plain.made({key: getattr(self, key) for key in self.plain.keys})

    def build(self, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> TaskLoss:
        from harness.tasks.adapted import adapted

        found: TaskLoss = adapted(self._made(), name=self.kind)
        return found

    def advice(self, config: RunConfig, *, ranks: int | None, rows: KnownRows | None) -> Iterator[str]:
        if hasattr(self.plain.make, "advice"):
            made = self._made()
            try:
                yield from made.advice(config)
            except Exception as error:
                raise ConfigError(f"advice of {self.kind} ({self.plain.where}) raised {told(error)}") from error


class MadeSection(Made):
    """A section of a user's file, with the kind that it was registered under."""


class MadeTask(MadeSection, TaskSection):
    """A task that is a section: what the loop asks it, it answers itself."""

    def build(self, splits: DataSplits, *, device: torch.device, dtype: torch.dtype) -> TaskLoss:
        from harness.tasks.adapted import adapted

        found: TaskLoss = adapted(self, name=self.kind)
        return found


@dataclass(frozen=True)
class Slot:
    """What a part can be of."""

    tag: str
    """The key that names the kind; none for a tracker."""
    path: str
    base: type[Any]
    own: type[Any]
    method: str
    """What a section of it has."""
    reserved: Set[str]
    """Keys that every kind has, so that no parameter may be called so."""


_DATA_KEYS = ("source", "global_batch", "workers", "collate", "lanes", "validation_fraction", "sampling", "stratify")
SLOTS: dict[str, Slot] = {
    "model": Slot("kind", "model.kind", ModelSection, OwnModel, "build", {"kind"}),
    "data": Slot("source", "data.source", DataSection, OwnData, "open", {"kind", *_DATA_KEYS}),
    "task": Slot("kind", "task.kind", TaskSection, OwnTask, "build", {"kind"}),
    "tracker": Slot("", "tracking.own", object, object, "", set()),
}


def section_of(
    slot: str,
    kind: str,
    thing: Any,
    *,
    where: str,
    module: str,
    names: Mapping[str, Any],
    own_names: Mapping[str, Any],
) -> Any:
    """Return the section of something that is registered; of a tracker, itself.

    Args:
        where: its place and name, for messages.
        names, own_names: what annotations that are texts may speak of: globals, and locals of a function.
    Raises:
        ConfigError: nothing can be built from it.
    """
    if not (inspect.isclass(thing) or inspect.isroutine(thing) or isinstance(thing, functools.partial)):
        raise ConfigError(
            f"{where}: is an object, of which a run can make no second one; put the decorator over its class, or over "
            "a function that returns it"
        )
    if slot == "tracker":
        return thing
    if inspect.isclass(thing) and issubclass(thing, Section):
        return _with_kind(slot, kind, thing, where=where, module=module)
    return _from_signature(slot, kind, thing, where=where, module=module, names=names, own_names=own_names)


def _with_kind(slot: str, kind: str, section: type[Section], *, where: str, module: str) -> Any:
    """Return a section with its kind among its keys."""
    known = SLOTS[slot]
    tag = section.model_fields.get(known.tag)
    if tag is not None and kind in typing.get_args(tag.annotation) and issubclass(section, known.base):
        return section
    _check_names(slot, section.model_fields, where=where, base=Section)
    is_task = slot == "task" and not hasattr(section, "build")
    bases = (MadeTask,) if is_task else (MadeSection, *(() if issubclass(section, known.base) else (known.base,)))
    method = getattr(section, known.method, None)
    if not is_task and method in (None, getattr(known.base, known.method)):
        raise ConfigError(f"{where}: is a section without {known.method}(), which makes the {slot}")
    tagged: dict[str, Any] = {known.tag: (Literal[kind], ...)}
    order = (bases[0], section, *bases[1:])
    made = create_model(section.__name__, __base__=order, __module__=section.__module__, **tagged)
    found: Any = made
    found._registered = (slot, kind, module)
    found.__doc__ = section.__doc__
    return found


def _check_names(slot: str, names: typing.Iterable[str], *, where: str, base: type[Any]) -> None:
    for name in names:
        if name in SLOTS[slot].reserved:
            raise ConfigError(f"{where}: has a parameter {name!r}, which is a key that every {slot} has; rename it")
        if hasattr(base, name):
            raise ConfigError(f"{where}: has a parameter {name!r}, which sections use themselves; rename it")


def _from_signature(
    slot: str, kind: str, thing: Any, *, where: str, module: str, names: Mapping[str, Any], own_names: Mapping[str, Any]
) -> Any:
    known = SLOTS[slot]
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: its signature cannot be read ({error}); register a function that calls it"
        ) from None
    fields: dict[str, Any] = {known.tag: (Literal[kind], ...)}
    has_split, facts, keys = False, [], []
    for parameter in parameters:
        name, has_default = parameter.name, parameter.default is not inspect.Parameter.empty
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ConfigError(f"{where}: parameter {name!r} takes no name (it stands before /), and keys are names")
        if slot == "data" and name == SPLIT:
            has_split = True
            continue
        if name.startswith("_") and has_default:
            continue  # of its author alone
        _check_names(slot, [name], where=where, base=known.own)
        if name.startswith("_"):
            raise ConfigError(f"{where}: has a parameter {name!r}, and keys do not begin with _; rename it")
        annotation = annotation_of(parameter, where=where, names=names, own_names=own_names)
        if has_default:
            annotation = annotation if parameter.default is not None else Union[annotation, None]  # noqa: UP007
            if not can_be_written(annotation, parameter.default):
                continue  # such as a class or a function, which YAML cannot say: it keeps its default
            fields[name] = (strict(annotation), parameter.default)
        elif not can_be_read(annotation):
            raise ConfigError(
                f"{where}: parameter {name!r} is a {shown(annotation)}, which YAML cannot say; give it a default, or "
                "take a text and look it up"
            )
        elif slot == "model" and name in FACTS:
            facts.append(name)
            fields[name] = (Union[strict(annotation), None], None)  # noqa: UP007
        else:
            fields[name] = (strict(annotation), ...)
        keys.append(name)
    made = create_model(thing_name(thing), __base__=known.own, __module__=module, **fields)
    found: Any = made
    found._registered = (slot, kind, module)
    found.plain = Plain(thing, slot, kind, where, module, tuple(keys), has_split, tuple(facts))
    found.__doc__ = inspect.getdoc(thing)
    return found


def thing_name(thing: Any) -> str:
    """Return what a class or a function is called, as one word."""
    name = getattr(thing, "__name__", "")
    return name if name.isidentifier() and not keyword.iskeyword(name) else "Own"


def key_texts(section: Any) -> dict[str, str]:
    """Return the keys of a kind beside those that every kind has, with what they take: a type, a default, a fact."""
    if not (inspect.isclass(section) and issubclass(section, Section)):
        return {}
    facts = section.plain.facts if issubclass(section, OwnModel) else ()
    texts = {}
    for name, field in section.model_fields.items():
        if name in {"kind", "source", *DatasetSection.model_fields}:
            continue
        if name in facts:
            texts[name] = "from the data"
        else:
            texts[name] = "wanted" if field.is_required() else repr(field.get_default(call_default_factory=True))
    return texts
