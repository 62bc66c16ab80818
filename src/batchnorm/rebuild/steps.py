"""The operators that are computed again after a normalization: their autograd nodes, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["VIEWS", "step_of"]

# Each makes the function of its input from the node's own numbers, so that nothing holds the node. A name ends in 1
# where the operator ran in place and saved its result.
_STEPS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "ReluBackward0": lambda node: torch.relu,
    "SigmoidBackward0": lambda node: torch.sigmoid,
    "TanhBackward0": lambda node: torch.tanh,
    "SiluBackward0": lambda node: F.silu,
    "HardswishBackward0": lambda node: F.hardswish,
    "HardsigmoidBackward0": lambda node: F.hardsigmoid,
    "MishBackward0": lambda node: F.mish,
    "GeluBackward0": lambda node: _with(F.gelu, approximate=node._saved_approximate),
    "SoftplusBackward0": lambda node: _with(F.softplus, beta=node._saved_beta, threshold=node._saved_threshold),
    "HardtanhBackward0": lambda node: _with(F.hardtanh, min_val=node._saved_min_val, max_val=node._saved_max_val),
    "LeakyReluBackward0": lambda node: _with(F.leaky_relu, negative_slope=node._saved_negative_slope),
    "LeakyReluBackward1": lambda node: _with(F.leaky_relu, negative_slope=node._saved_negative_slope),
    "EluBackward0": lambda node: _elu(node._saved_alpha, node._saved_scale, node._saved_input_scale),
    "EluBackward1": lambda node: _elu(node._saved_alpha, node._saved_scale, node._saved_input_scale),
    "CeluBackward0": lambda node: _with(F.celu, alpha=node._saved_alpha),
    "CeluBackward1": lambda node: _with(F.celu, alpha=node._saved_alpha),
}

# Nodes of operators whose result shares its input's memory: they lead from a view to what it is a view of.
VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        "View", "ReshapeAlias", "UnsafeView", "Permute", "Transpose", "T", "Unsqueeze", "Squeeze", "Slice", "Select",
        "Alias", "Expand", "Narrow", "Movedim",
    )
) | {"SqueezeBackward1", "SqueezeBackward2"}  # fmt: skip


def _with(function: Callable[..., Tensor], **numbers: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: function(z, **numbers)


def _elu(alpha: float, scale: float, input_scale: float) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.ops.aten.elu(z, alpha, scale, input_scale)


def step_of(node: Any, result: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The function that made `result` at this node, where it is known."""
    name = type(node).__name__
    if name == "ToCopyBackward0":
        dtype, device = result.dtype, result.device
        return lambda z: z.to(device, dtype)
    make = _STEPS.get(name)
    return None if make is None else make(node)
