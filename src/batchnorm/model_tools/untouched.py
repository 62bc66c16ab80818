"""Running a model without leaving a trace on it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import UserError
from .kinds import is_norm

__all__ = ["call", "generators_kept", "no_encoder_fast_path", "run_example", "still", "untouched"]


def call(model: nn.Module, example: Any) -> Any:
    """Calls the model on an example: a tuple is its positional arguments, a mapping its keyword arguments,
    anything else its one argument."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        return model(**example)
    return model(example)


@contextmanager
def generators_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, the random generators of torch (CPU and the model's GPUs), Python and NumPy are as they were."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """On leaving: buffers, mode flags and the random generators are as they were on entering, whatever ran
    inside and however it ended. Gradients are off inside."""
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = {id(b): (b, b.detach().clone()) for held in buffers for b in held.values() if b is not None}
    try:
        with generators_kept(model), torch.no_grad():
            yield
    finally:
        for module, flag, held in zip(modules, flags, buffers, strict=True):
            module.training = flag
            if not isinstance(module, torch.jit.ScriptModule):  # its buffers cannot be exchanged, only written to
                module._buffers.clear()
                module._buffers.update(held)
        with torch.no_grad():
            for buffer, value in values.values():
                if buffer.shape != value.shape:
                    buffer.data = value
                elif not torch.equal(buffer, value):  # else its version, which autograd checks, need not move
                    buffer.copy_(value)


@contextmanager
def no_encoder_fast_path() -> Iterator[None]:
    """torch's fused encoder skips the calls of the Linears inside it; here each layer has to be called."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def still(model: nn.Module) -> None:
    """Normalizations and dropouts in eval: one sample is enough then, and no statistics move."""
    for module in model.modules():
        if is_norm(module) or isinstance(module, (_DropoutNd, _InstanceNorm)):
            module.training = False


def run_example(model: nn.Module, example: Any, what: str) -> Any:
    """Runs the example with the model's own mode, but normalizations and dropouts in eval: one sample is
    enough, no statistics move. Call it inside `untouched`.

    Raises:
        UserError: the model has lazy parameters, or does not run on the example; `what` names the caller.
    """
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise UserError(f"{what}: parameter {lazy} is still lazy; run the model once to give it its shape")
    still(model)
    try:
        with no_encoder_fast_path(), torch.compiler.set_stance("force_eager"):
            return call(model, example)
    except Exception as error:
        shapes = ", ".join(
            str(tuple(t.shape)) for t in torch.utils._pytree.tree_leaves(example) if isinstance(t, Tensor)
        )
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{what}: {type(model).__name__} does not run on the example input of shape {shapes or 'unknown'}: "
            f"{type(error).__name__}: {reason[0] if reason else 'no message'}; pass an input as the model takes it"
        ) from error
