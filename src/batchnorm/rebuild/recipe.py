"""How an output is computed again, bit for bit, and when it must not be."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef

from ..module_names import full_name
from ..ops import Form

__all__ = ["NormRecipe", "Recipe", "Saved", "StepRecipe", "Versions", "key_of_storage"]

_graph_task = torch._C._current_graph_task_id
_NAMES = ("input", "mean", "var", "count", "weight", "bias", "residual", "mask")  # of what the nodes save, in order


def key_of_storage(tensor: Tensor) -> int:
    """The address of the storage's own object: unique while a `StorageWeakRef` to it exists."""
    return cast(int, tensor.untyped_storage()._cdata)


class Versions:
    """The version counter of a tensor, without its memory.

    An alias shares the counter; assigning to its `.data` exchanges the storage and leaves the counter.
    """

    __slots__ = ("_alias",)

    def __init__(self, tensor: Tensor) -> None:
        self._alias = tensor.detach()
        self._alias.data = tensor.new_empty(0)

    @property
    def now(self) -> int:
        return self._alias._version


class Recipe:
    """Computes one output again, once for all that ask for it in a backward.

    `askers` says how many may ask. The last of them, or the end of the backward, frees the result.
    """

    def __init__(self, layer: weakref.ref[nn.Module], stride: tuple[int, ...], version: int) -> None:
        self.layer = layer
        self.askers = 0
        self._stride, self._version = stride, version
        self._held: Callable[[], Tensor | None] = lambda: None
        self._shared: Tensor | None = None
        self._asked: tuple[Any, ...] = (None, None, 0)  # in which backward and stream, and by how many

    @property
    def device(self) -> torch.device:
        raise NotImplementedError  # each kind of recipe says it

    def compute(self) -> Tensor:
        raise NotImplementedError  # each kind of recipe says it

    def watch(self, tensor: Tensor | None) -> None:
        """Take this tensor for the output while something else holds it: then nothing is saved and nothing computed."""
        if tensor is not None:
            self._held = weakref.ref(tensor)

    def output(self) -> Tensor:
        """The output: the one that something still holds, the one that another asker had made, or a new one."""
        held = self._held()
        if held is not None and held._version == self._version:
            return held.detach()
        device = self.device
        task, stream = _graph_task(), torch.cuda.current_stream(device) if device.type == "cuda" else None
        shared, asked = (self._shared, self._asked[2]) if self._asked[:2] == (task, stream) else (None, 0)
        if shared is None:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                shared, asked = self._laid_out(self.compute()), 0
        asked += 1
        if asked >= self.askers or task == -1:
            self.free()
            return shared
        if asked == 1:
            # weakly: the recipe keeps x, which is to go as soon as the consumers are done
            Variable._execution_engine.queue_callback(functools.partial(_free, weakref.ref(self)))
        self._shared, self._asked = shared, (task, stream, asked)
        return shared

    def free(self) -> None:
        """Let go of a result that others were expected to ask for."""
        self._shared, self._asked = None, (None, None, 0)

    def _laid_out(self, out: Tensor) -> Tensor:
        if out.stride() == self._stride:
            return out
        return torch.empty_strided(out.size(), self._stride, dtype=out.dtype, device=out.device).copy_(out)

    def name(self) -> str:
        layer = self.layer()
        return "a batch normalization" if layer is None else full_name(layer)


def _free(recipe: weakref.ref[Recipe]) -> None:
    found = recipe()
    if found is not None:
        found.free()


class NormRecipe(Recipe):
    """``act(norm(x))`` from what the normalization's node keeps for its own backward.

    It holds those tensors itself, since the consumer's backward may come after the node has let go of them.
    """

    def __init__(self, layer: weakref.ref[nn.Module], node: Any, stride: tuple[int, ...], version: int) -> None:
        super().__init__(layer, stride, version)
        self._tensors = tuple(t if t is None else t.detach() for t in node.saved_tensors[: len(_NAMES)])
        self._versions = tuple(0 if t is None else t._version for t in self._tensors)
        self._form: Form = node.form
        self._output_again: Callable[..., Tensor] = type(node)._forward_cls.output_again

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self._tensors[0]).device

    def compute(self) -> Tensor:
        for name, tensor, version in zip(_NAMES, self._tensors, self._versions, strict=True):
            if tensor is not None and tensor._version != version:
                raise RuntimeError(modified(self.name(), name, tensor.size(), tensor._version, version))
        return self._output_again(self._tensors, self._form)


class StepRecipe(Recipe):
    """What one operator made of a normalization's output."""

    def __init__(self, base: Recipe, step: Callable[[Tensor], Tensor], result: Tensor) -> None:
        super().__init__(base.layer, result.stride(), result._version)
        base.askers += 1
        self._base, self._step = base, step
        self._storage = StorageWeakRef(result.untyped_storage())  # its address is this recipe's key

    @property
    def device(self) -> torch.device:
        return self._base.device

    def compute(self) -> Tensor:
        return self._step(self._base.output())


class Saved:
    """What a consumer keeps in the place of the tensor it saved."""

    __slots__ = ("_offset", "_recipe", "_size", "_stride", "_version", "_versions")

    def __init__(self, recipe: Recipe, tensor: Tensor) -> None:
        recipe.askers += 1
        self._recipe = recipe
        self._versions, self._version = Versions(tensor), tensor._version
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        """The tensor, computed again.

        Raises:
            RuntimeError: it, or what it is computed from, was changed in place since it was saved.
        """
        recipe, now = self._recipe, self._versions.now
        if now != self._version:
            raise RuntimeError(modified(recipe.name(), "output", self._size, now, self._version))
        return recipe.output().as_strided(self._size, self._stride, self._offset)


def modified(layer: str, what: str, size: torch.Size, now: int, then: int) -> str:
    """torch's own sentence on a tensor that was changed in place, with the layer's name."""
    return (
        f"{layer}: one of the variables needed for gradient computation has been modified by an inplace operation: the "
        f"layer's {what} {list(size)} is at version {now}; expected version {then} instead. Change a clone, or "
        "do so after the backward"
    )
