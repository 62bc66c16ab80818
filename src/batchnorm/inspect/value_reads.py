"""What a run lets Python know of values that another input would change.

Control flow can depend on such a value only after Python has read it: as a number or truth value, as a list, an array
or memory, or as the size of a result. Values that come from parameters, buffers and constants alone are the same in
every run. What another thread reads, or a compiled function by an address it was given before, is not seen, and of
random generators outside torch only Python's and NumPy's global ones are.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nests import tensors_in
from .operators import operator_name
from .storages import Key, key_of

__all__ = ["PythonReads", "ValueReads"]

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# They hand a tensor's memory to Python without an operator.
_MEMORY = {"numpy", "tolist", "data_ptr", "storage", "untyped_storage", "_typed_storage"}
_METHODS = {*_MEMORY, "__array__", "__dlpack__", "__deepcopy__", "__reduce_ex__"}
_SAID = {"_local_scalar_dense": "bool(), int() or item()", "__array__": "numpy"}


class ValueReads:
    """Follows which storages hold the same values in every run, and notes each reading of another one."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, None] = {}  # in order, each once
        self._fixed = {key_of(tensor) for tensor in _held(model)}
        self._drawn = _random_states()

    def note_operator(self, func: Any, keys: list[Key], inputs: list[Tensor], made: list[Tensor], where: str) -> None:
        """An operator read the storages `keys` of `inputs`, and wrote or made the tensors `made`."""
        fixed = self._are_fixed(keys)
        if not fixed and _BY_VALUE.intersection(func.tags) and not _picks_by_place(func, inputs):
            self._add(operator_name(func), where)
        changed = {key for key in map(key_of, made) if not isinstance(key, int)}
        if fixed and torch.Tag.nondeterministic_seeded not in func.tags and operator_name(func) != "lift_fresh":
            self._fixed |= changed
        else:
            self._fixed -= changed

    def note_method(self, name: str, keys: list[Key], where: str) -> None:
        """Python took the memory of tensors."""
        if not self._are_fixed(keys):
            self._add(name, where)

    def drew_in_python(self) -> bool:
        """Whether random numbers were drawn meanwhile that torch does not draw."""
        return _random_states() != self._drawn

    def _are_fixed(self, keys: list[Key]) -> bool:
        return all(key in self._fixed for key in keys)

    def _add(self, name: str, where: str) -> None:
        self.found[f"{where or 'the model'} reads values by {_SAID.get(name, name)}"] = None


class PythonReads(TorchFunctionMode):
    """Calls `note(method, tensors)` when Python takes the memory of tensors."""

    def __init__(self, note: Callable[[str, list[Tensor]], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _METHODS:
            self._note(name, tensors_in((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _picks_by_place(func: Any, inputs: list[Tensor]) -> bool:
    """Whether it is an indexing without a mask, whose result has the size of the indices."""
    masks = (torch.bool, torch.uint8)
    return bool(operator_name(func) == "index" and not any(tensor.dtype in masks for tensor in inputs[1:]))


def _held(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        values = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        yield from (value for value in values if isinstance(value, Tensor))


def _random_states() -> tuple[Any, ...]:
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    state = numpy.get_state() if numpy else None
    return random.getstate(), None if state is None else (state[1].tobytes(), state[2:])
