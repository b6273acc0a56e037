"""Batches are trees: dict, list, tuple, NamedTuple and dataclass, of tensors and whatever else a row has."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from torch import Tensor


def map_tree(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return a tree of the same shape with `function(leaf, *leaves of the others)` in the place of each leaf.

    A kind of dict, such as the outputs of transformers, stays of its kind.

    Args:
        others: trees with the same keys, lengths and fields as `tree`.
    """
    names = children(tree)
    if names is None:
        return function(tree, *others)
    parts = {name: map_tree(function, *(child(each, name) for each in (tree, *others))) for name in names}
    return with_children(tree, parts)


def with_children(tree: Any, parts: dict[Any, Any]) -> Any:
    """Return a tree of the kind of `tree` with others in the place of its children.

    Args:
        parts: one for each of its keys, places or fields, in their order.
    """
    if type(tree) is dict:
        return parts
    if isinstance(tree, MutableMapping):
        made = copy.copy(tree)
        made.update(parts)
        return made
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*parts.values())
    if isinstance(tree, list | tuple):
        return list(parts.values()) if isinstance(tree, list) else tuple(parts.values())
    made = copy.copy(tree)  # and not made by its constructor, which may not take all fields, or take tensors only
    for name, part in parts.items():
        object.__setattr__(made, name, part)
    return made


def leaves(tree: Any) -> Iterator[Any]:
    """Yield what stands at the ends of a tree, in its order."""
    for _, leaf in paths(tree):
        yield leaf


def paths(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf with its dotted path, such as `image.left` or `1.mask`; the path of a lone leaf is empty."""
    names = children(tree)
    if names is None:
        yield prefix, tree
        return
    for name in names:
        yield from paths(child(tree, name), f"{prefix}.{name}" if prefix else str(name))


def children(tree: Any) -> list[Any] | None:
    """Return the keys, places or fields of a tree; None for a leaf."""
    if isinstance(tree, Tensor):
        return None
    if isinstance(tree, dict | MutableMapping):
        return list(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return list(tree._fields)
    if isinstance(tree, list | tuple):
        return list(range(len(tree)))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [field.name for field in dataclasses.fields(tree)]
    return None


def child(tree: Any, name: Any) -> Any:
    """Return one of the children of a tree by its key, place or field."""
    return tree[name] if isinstance(tree, dict | MutableMapping) or isinstance(name, int) else getattr(tree, name)
