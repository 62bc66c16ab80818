"""Running a model on an example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..errors import UserError
from .modules import is_norm, refuse_lazy
from .nests import arguments_of, tensors_in

__all__ = ["no_encoder_fast_path", "run_example", "still"]


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
    """Run the example with the model's own mode, but normalizations and dropouts in eval: one sample is
    enough, no statistics move. Call it inside `untouched`.

    Raises:
        UserError: the model has lazy parameters, or does not run on the example; `what` names the caller.
    """
    refuse_lazy(model, what)
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise UserError(f"{what}: parameter {lazy} is still lazy; run the model once to give it its shape")
    still(model)
    try:
        with no_encoder_fast_path(), torch.compiler.set_stance("force_eager"):
            args, kwargs = arguments_of(example)
            return model(*args, **kwargs)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(example))
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{what}: {type(model).__name__} does not run on the example input of shape {shapes or 'unknown'}: "
            f"{type(error).__name__}: {reason[0] if reason else 'no message'}; pass an input as the model takes it"
        ) from error
