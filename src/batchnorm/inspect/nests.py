"""Tensors and arrays in any nest: containers of every kind, and objects that hold them as attributes.

A nest is copied by `copy.deepcopy`, so that each container is rebuilt as its class wants it. What holds no tensor and
no array (a file, a lock, a tokenizer, a module) is in the copy as it is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UserError, quote_error

__all__ = [
    "arguments_of",
    "copied",
    "holds_data",
    "is_tuple_of_parts",
    "mapped",
    "modules_in",
    "moved",
    "samples_in",
    "tensors_in",
]

_DEPTH = 3  # of objects within objects; a batch may hold its whole data set somewhere
_WHOLE = (
    nn.Module, type, type(None), int, float, complex, str, bytes, torch.device, torch.dtype, torch.layout,
    torch.memory_format, torch.Generator,
)  # fmt: skip


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in any nest of tuples, lists, mappings and objects that hold them as attributes."""
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def modules_in(tree: Any) -> list[nn.Module]:
    """The modules in any nest of containers, and in objects that hold them as attributes."""
    parts = _leaves(tree, lambda value: isinstance(value, nn.Module), depth=1)
    return [part for part in parts if isinstance(part, nn.Module)]


def holds_data(tree: Any) -> bool:
    """Whether there is a tensor or an array in it."""
    return any(map(_is_data, _leaves(tree)))


def copied(tree: Any, what: str = "the example") -> Any:
    """The nest with copies of its tensors and arrays, without their gradients: a model may write to its input.

    Raises:
        UserError: an object with tensors in it that cannot be copied; `what` names the nest.
    """
    return mapped(lambda tensor: tensor.detach().clone(), tree, what)


def mapped(function: Callable[[Tensor], Tensor], tree: Any, what: str = "the example") -> Any:
    """The nest with what the function makes of each tensor, and copies of its arrays. Raises as `copied` does."""
    memo: dict[int, Any] = {}
    for leaf in _leaves(tree):
        if isinstance(leaf, Tensor):
            memo[id(leaf)] = function(leaf)
        elif not _is_data(leaf):
            memo[id(leaf)] = leaf
    return _rebuilt(tree, memo, what)


def moved(tree: Any, device: torch.device | None, what: str = "the example") -> Any:
    """The nest on a device: by each object's own `to` where it has one, which may change the object in place."""
    leaves = list(_leaves(tree, _moves_itself))
    there = [leaf.device == device if isinstance(leaf, Tensor) else not _moves_itself(leaf) for leaf in leaves]
    if device is None or all(there):
        return tree
    return _rebuilt(tree, {id(leaf): leaf.to(device) if _moves_itself(leaf) else leaf for leaf in leaves}, what)


def samples_in(tree: Any) -> int | None:
    """How many samples a batch holds: the first axis of its first tensor that has one, or of an array where there is no
    tensor; what counts itself (graphs, packed sequences) is asked. None where nothing tells."""
    for count in (getattr(tree, name, None) for name in ("num_graphs", "batch_size", "batch_sizes")):
        if isinstance(count, int):
            return count
        if isinstance(count, Tensor) and count.numel():  # a PackedSequence's first time step has all its sequences
            return int(count[0])
    if isinstance(tree, Mapping) or is_tuple_of_parts(tree):
        parts = tree.values() if isinstance(tree, Mapping) else tree
        return next((count for count in map(samples_in, parts) if count is not None), None)
    data = [leaf for leaf in _leaves(tree) if _is_data(leaf) and leaf.ndim]
    first = next((leaf for leaf in data if isinstance(leaf, Tensor)), data[0] if data else None)
    if first is None:
        return None
    return int(first.size(0) if isinstance(first, Tensor) else first.shape[0])


def is_tuple_of_parts(batch: Any) -> bool:
    """Whether it is several inputs, or an input and its target; a PackedSequence is a tuple, and one input."""
    return isinstance(batch, (tuple, list)) and not _moves_itself(batch)


def arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: a tuple is its positional arguments, a mapping its keyword arguments, anything else
    its one argument."""
    if isinstance(example, tuple) and is_tuple_of_parts(example):
        return tuple(example), {}
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        return (), dict(example)
    return (example,), {}


def _leaves(tree: Any, stop: Callable[[Any], bool] | None = None, depth: int = _DEPTH) -> Iterator[Any]:
    """Everything in the nest that is no container; an object without any data in it is one leaf."""
    for leaf in tree_leaves(tree, is_leaf=stop):
        whole = depth == 0 or isinstance(leaf, _WHOLE) or _is_data(leaf) or (stop is not None and stop(leaf))
        inside = [] if whole else list(_leaves(_inside(leaf), stop, depth - 1))
        if any(_is_data(part) or (stop is not None and stop(part)) for part in inside):
            yield from inside
        else:
            yield leaf


def _inside(value: Any) -> list[Any]:
    """What an object holds that pytree takes for a leaf."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in _as_tuple(vars(kind).get("__slots__", ()))]
    held = [vars(value)] if hasattr(value, "__dict__") else []
    return [*held, *(getattr(value, name) for name in slots if hasattr(value, name))]


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _is_data(value: Any) -> bool:
    return isinstance(value, (Tensor, getattr(sys.modules.get("numpy"), "ndarray", Tensor)))


def _moves_itself(value: Any) -> bool:
    return not isinstance(value, _WHOLE) and callable(getattr(value, "to", None))


def _rebuilt(tree: Any, memo: dict[int, Any], what: str) -> Any:
    try:
        return copy.deepcopy(tree, memo)
    except Exception as error:  # whatever an object's own way of copying raises
        raise UserError(
            f"{what} is a {type(tree).__name__} that cannot be copied: {quote_error(error)}; pass tensors, or "
            "containers of them"
        ) from error
