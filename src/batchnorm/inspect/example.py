"""Running a model on an example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map

from ..errors import UserError
from .modules import is_norm, refuse_lazy

__all__ = ["copied", "no_encoder_fast_path", "run_example", "still"]


def _call(model: nn.Module, example: Any) -> Any:
    """Call the model on an example: a tuple is its positional arguments, a mapping its keyword arguments,
    anything else its one argument."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        return model(**example)
    return model(example)


def copied(example: Any) -> Any:
    """The example with copies of its tensors: a model may write to its input."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)


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
            return _call(model, example)
    except Exception as error:
        shapes = ", ".join(
            str(tuple(t.shape)) for t in torch.utils._pytree.tree_leaves(example) if isinstance(t, Tensor)
        )
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{what}: {type(model).__name__} does not run on the example input of shape {shapes or 'unknown'}: "
            f"{type(error).__name__}: {reason[0] if reason else 'no message'}; pass an input as the model takes it"
        ) from error
