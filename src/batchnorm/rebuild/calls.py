"""Around a layer's call: which saved tensors are told by an output, and the hooks that keep recipes in their place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..execution import Where, where_we_run
from .recipe import NormRecipe, Recipe, Saved, StepRecipe, Versions, key_of_storage
from .steps import VIEWS, step_of

__all__ = ["can_rebuild", "mark_output", "release_saved"]

_SEEN = "batchnorm: saved tensors looked at"  # a key of a node's metadata
_ROWS = (Where.EAGER, Where.RECOMPUTE)  # the others have no nodes, or show them to a compiler
_default_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Output:
    """What the node of a normalization knows of its output. It holds nothing that would keep memory."""

    def __init__(self, layer: nn.Module, out: Tensor, axis: int) -> None:
        self.layer = weakref.ref(layer)
        self.storage = StorageWeakRef(out.untyped_storage())
        self.versions, self.version = Versions(out), out._version
        self._tensor = weakref.ref(out)
        strides = list(out.stride())
        strides.insert(1, strides.pop(axis))
        self._stride = tuple(strides)  # the operators have the channels at axis 1
        self._recipes: dict[int, weakref.ref[Recipe]] = {}  # by the storage of what they compute

    def recipe(self, node: Any) -> Recipe:
        """How the output is computed again; one for all that ask."""
        found = self._known(self.storage.cdata)
        if found is None:
            found = NormRecipe(self.layer, node, self._stride, self.version)
            found.watch(self._tensor())
            self._recipes[self.storage.cdata] = weakref.ref(found)
        return found

    def step_recipe(self, node: Any, step: Any, result: Tensor, in_place: bool) -> Recipe:
        """How the result of an operator on the output is computed again; one for all that ask."""
        key = -1 if in_place else key_of_storage(result)  # in place, both have one storage
        found = self._known(key)
        if found is None:
            found = StepRecipe(self.recipe(node), step, result)
            self._recipes[key] = weakref.ref(found)
        if result.grad_fn is not None:  # the tensor itself, and no alias that an operator saved
            found.watch(result)
        return found

    def _known(self, key: int) -> Recipe | None:
        reference = self._recipes.get(key)
        return None if reference is None else reference()


def can_rebuild(input: Tensor, residual: Tensor | None) -> bool:
    """Whether the output of this call can be computed again from its input alone. What earlier calls' outputs were
    saved for is released on the way.

    A residual is kept in a sum; other people's hooks on saved tensors (checkpointing, offloading) decide by themselves.
    """
    if not torch.is_grad_enabled() or where_we_run() not in _ROWS:
        return False
    _release(input)
    if residual is not None:
        _release(residual)
        return False
    return type(input) is Tensor and input.layout is torch.strided and _default_hooks(False) is None


def mark_output(layer: Any, out: Tensor) -> None:
    """Let the normalization's node know its output."""
    node = out.grad_fn
    while node is not None and type(node).__name__ in VIEWS:  # the channels' axis was moved
        node = node.next_functions[0][0]
    if hasattr(getattr(type(node), "_forward_cls", None), "output_again"):
        node.batchnorm_output = Output(layer, out, layer.options.feature_axis)  # type: ignore[union-attr]  # a context of our own


def release_saved(result: Any) -> None:
    """Release what was saved on the way to `result` since the last normalization's call."""
    if torch.is_grad_enabled() and where_we_run() in _ROWS:
        for tensor in _tensors(result):
            _release(tensor)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple, dict)):
        for value in result.values() if isinstance(result, dict) else result:
            yield from _tensors(value)


def _release(value: Tensor) -> None:
    """Put recipes in the place of saved tensors, from the node of `value` back to the normalizations before it.

    Each node is looked at once: what it saved does not change.
    """
    waiting = [value.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or hasattr(node, "batchnorm_output"):
            continue
        metadata = node.metadata
        if _SEEN in metadata:
            continue
        metadata[_SEEN] = True
        kind: Any = type(node)
        for name in _saved_names(kind):
            _release_one(node, name)
        waiting.extend(before for before, _ in node.next_functions)


@functools.cache
def _saved_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _release_one(node: Any, name: str) -> None:
    try:
        saved = getattr(node, name)
    except RuntimeError:  # a backward went through here and freed it
        return
    for one in saved if isinstance(saved, tuple) else (saved,):
        # a hook of other people's has it: to ask for the tensor would compute or load it
        if one is None or one.unpack_hook is not None or not isinstance(one.data, Tensor):
            continue
        source = node if name == "_raw_saved_result" else one.data.grad_fn
        recipe = _recipe(one.data, source)
        if recipe is not None and _unchanged(node, one, source):
            one.register_hooks(functools.partial(Saved, recipe), Saved.tensor)


def _unchanged(node: Any, saved: Any, source: Any) -> bool:
    """Whether torch would give the saved tensor out now: if not, its own error is the right one."""
    try:
        _ = node._saved_result if source is node else saved.unpack()
    except RuntimeError:
        return False
    return True


def _recipe(tensor: Tensor, node: Any) -> Recipe | None:
    """How a saved tensor that `node` made is computed again, if a normalization's output tells it."""
    if node is None or type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return None
    step = step_of(node, tensor)
    if step is None:
        return _recipe_of_view(tensor, node)
    before = node.next_functions[0][0]
    output: Output | None = getattr(before, "batchnorm_output", None)
    if output is None:
        return None
    in_place = output.storage.cdata == key_of_storage(tensor)
    # the output is what the step found: changed by nobody, or by the step alone
    wanted = (output.version + 1, output.version + 1) if in_place else (output.version, 0)
    if (output.versions.now, tensor._version) != wanted:
        return None
    return output.step_recipe(before, step, tensor, in_place)


def _recipe_of_view(tensor: Tensor, node: Any) -> Recipe | None:
    while node is not None and type(node).__name__ in VIEWS:
        node = node.next_functions[0][0]
    output: Output | None = getattr(node, "batchnorm_output", None)
    if output is None or output.storage.cdata != key_of_storage(tensor) or tensor._version != output.version:
        return None
    return output.recipe(node)
