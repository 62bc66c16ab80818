"""Whatever runs inside, the model, the optimizers and the random generators come out bit for bit as they went in."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .modules import unregistered_modules

__all__ = ["Preserved", "generators_kept", "modes_and_buffers_kept", "preserved", "untouched"]

_CONTAINERS = (dict, list, set, deque)


class _Random:
    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy = getattr(sys.modules.get("numpy"), "random", None)
        self.numpy_state = self.numpy.get_state() if self.numpy else None
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        random.setstate(self.python)
        if self.numpy:
            self.numpy.set_state(self.numpy_state)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class _Attributes:
    """An object's attributes, with the contents of the containers among them: also its hooks, modes and tensors."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.values = dict(owner.__dict__)
        self.contents = {name: copy.copy(v) for name, v in self.values.items() if isinstance(v, _CONTAINERS)}

    def restore(self) -> None:
        held = self.owner.__dict__
        held.clear()
        held.update(self.values)
        for name, before in self.contents.items():
            container = self.values[name]
            if not _same_contents(container, before):
                container.clear()
                (container.update if isinstance(container, (dict, set)) else container.extend)(before)

    def tensors(self) -> Iterator[Tensor]:
        yield from (v for v in self.values.values() if isinstance(v, Tensor))
        for content in self.contents.values():
            items = content.values() if isinstance(content, dict) else content
            yield from (v for v in items if isinstance(v, Tensor))


class _Values:
    """What tensors hold, each once; one that nothing changed is not written to."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        if id(tensor) not in self._before and not nn.parameter.is_lazy(tensor) and tensor.device.type != "meta":
            self._before[id(tensor)] = (tensor, tensor.detach().clone())

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, value in self._before.values():
                _write_back(tensor, value)


class Preserved:
    """What was there before: of every model and every optimizer that is added, also while things run already."""

    def __init__(self, model: nn.Module, *, gradients: bool = False, parameters: bool = True) -> None:
        self._attributes: dict[nn.Module, _Attributes] = {}
        self._tensors = _Values()
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._required: list[tuple[Tensor, bool]] = []
        self._optimizers: dict[int, tuple[Optimizer, list[Any]]] = {}
        self._random = _Random()
        self.add_model(model, gradients=gradients, parameters=parameters)

    def add_model(self, model: nn.Module, *, gradients: bool = False, parameters: bool = True) -> None:
        """Keep the modules, but those that are kept already."""
        modules = (*model.modules(), *unregistered_modules(model))
        new = {module: _Attributes(module) for module in modules if module not in self._attributes}
        self._attributes |= new
        for attributes in new.values():
            for tensor in attributes.tensors():
                if parameters or not isinstance(tensor, nn.Parameter):
                    self._tensors.add(tensor)
        for parameter in (p for module in new for p in module.parameters(recurse=False)):
            self._gradients.append((parameter, parameter.grad))
            self._required.append((parameter, parameter.requires_grad))
            if gradients and parameter.grad is not None:
                self._tensors.add(parameter.grad)

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Keep the optimizer's state, settings and parameters; a second time for the same one does nothing."""
        if id(optimizer) in self._optimizers:
            return
        parts = [_Attributes(optimizer)]
        inner: list[Any] = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
        for state in optimizer.state.values():
            inner.append((state, dict(state), None))
            for value in state.values():
                self._tensors.add(value) if isinstance(value, Tensor) else None
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._tensors.add(parameter)
        self._optimizers[id(optimizer)] = (optimizer, [*parts, *inner])

    def restore(self) -> None:
        """Put everything back; values that nothing changed are not written to."""
        for attributes in self._attributes.values():
            attributes.restore()
        for _, parts in self._optimizers.values():
            parts[0].restore()
            for held, before, parameters in parts[1:]:
                held.clear()
                held.update(before)
                if parameters is not None:
                    held["params"][:] = parameters
        for tensor, required in self._required:
            if tensor.requires_grad != required:
                tensor.requires_grad_(required)
        self._tensors.restore()
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        self._random.restore()


@contextmanager
def preserved(
    model: nn.Module, optimizers: Iterable[Optimizer] = (), *, gradients: bool = False
) -> Iterator[Preserved]:
    """On leaving, also by an exception: attributes, hooks, modes, parameters, buffers and random generators are as
    they were; with `gradients` the values of the gradients too. Optimizers may be added later."""
    kept = Preserved(model, gradients=gradients)
    for optimizer in optimizers:
        kept.add_optimizer(optimizer)
    try:
        yield kept
    finally:
        kept.restore()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """`preserved`, for a run that trains nothing: gradients are off inside, and no copy of the parameters is kept."""
    kept = Preserved(model, parameters=False)
    try:
        with torch.no_grad():
            yield
    finally:
        kept.restore()


@contextmanager
def modes_and_buffers_kept(model: nn.Module) -> Iterator[None]:
    """The cheap form of `untouched`, for a loop: gradients are off inside, and of what a forward may change only the
    modes and the buffers are put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = _Values(model.buffers())
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        buffers.restore()


@contextmanager
def generators_kept() -> Iterator[None]:
    """On leaving, the random generators of torch, Python and NumPy are as they were."""
    kept = _Random()
    try:
        yield
    finally:
        kept.restore()


def _same_contents(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        # Keys may be tensors, which compare by value and in pieces.
        keys = zip(container, before, strict=True)
        return all((a is b or (isinstance(a, str) and a == b)) and container[a] is before[b] for a, b in keys)
    if isinstance(container, set):
        return bool(container == before)
    return all(a is b for a, b in zip(container, before, strict=True))


def _write_back(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
        tensor.data = value
    elif not _same_bits(tensor, value):  # else its version, which autograd checks, need not move
        tensor.copy_(value)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Bits, not values: NaN equals NaN, and −0 differs from 0."""
    try:
        return torch.equal(_bytes(a), _bytes(b))
    except (RuntimeError, NotImplementedError):  # sparse, quantized, …: no bytes to look at
        return False


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
