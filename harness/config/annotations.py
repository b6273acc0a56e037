"""What an annotation says of a key: whether YAML can say it, and how strictly it is taken."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import Field, Strict, TypeAdapter, ValidationError, WrapValidator
from pydantic.errors import PydanticUserError

from harness.config.fields import NoneOfSeveral
from harness.errors import ConfigError


def annotation_of(
    parameter: inspect.Parameter, *, where: str, names: Mapping[str, Any], own_names: Mapping[str, Any]
) -> Any:
    """Return the annotation of a parameter, with what its text names; Any without one.

    Raises:
        ConfigError: it names what is not there.
    """
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return typing.get_type_hints(holder, dict(names), dict(own_names), include_extras=True)[parameter.name]
    except Exception as error:
        raise ConfigError(
            f"{where}: the annotation of parameter {parameter.name!r}, {shown(parameter.annotation)}, cannot be "
            f"understood ({error}); import what it names (not under TYPE_CHECKING), or leave it out"
        ) from None


def shown(annotation: Any) -> str:
    """Return an annotation as its author wrote it."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def can_be_read(annotation: Any) -> bool:
    """Return whether YAML can say a value of it."""
    try:
        TypeAdapter(annotation).json_schema()
    except (PydanticUserError, TypeError, AttributeError):
        return False
    return True


def can_be_written(annotation: Any, default: Any) -> bool:
    """Return whether YAML can say it, and this default of it."""
    if not can_be_read(annotation):
        return False
    try:
        adapter = TypeAdapter(annotation)
        adapter.validate_python(adapter.dump_python(default, mode="json"))
    except (ValidationError, TypeError, ValueError):
        return False
    return True


def strict(annotation: Any) -> Any:  # noqa: PLR0911  # one for each form of an annotation
    """Return an annotation that takes what looks like its type and nothing that would have to be turned into it."""
    plain = {int: Annotated[int, Strict()], bool: Annotated[bool, Strict()], str: Annotated[str, Strict()]}
    if annotation is float:
        return Annotated[float, Strict(), Field(allow_inf_nan=False)]
    if annotation in (list, tuple, dict):
        return {list: list[Any], tuple: tuple[Any, ...], dict: dict[str, Any]}[annotation]
    if isinstance(annotation, type) and annotation in plain:
        return plain[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return Annotated[(strict(arguments[0]), *arguments[1:])]
    if origin in (Union, types.UnionType):
        options: Any = Union.__getitem__(tuple(strict(argument) for argument in arguments))
        one_of_several = sum(argument is not type(None) for argument in arguments) > 1
        return Annotated[options, WrapValidator(_told_once)] if one_of_several else options
    if origin is None or origin is Literal or not arguments:
        return annotation
    taken = tuple(argument if argument is Ellipsis else strict(argument) for argument in arguments)
    try:
        return origin[taken if len(taken) > 1 else taken[0]]
    except TypeError:
        return annotation


def _told_once(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Have a value that none of several types takes be one problem, not one for each."""
    try:
        return validate(value)
    except ValidationError:
        raise NoneOfSeveral("none of the types takes it") from None
