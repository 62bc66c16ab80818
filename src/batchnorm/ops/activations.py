"""The activations that the operators compute after the affine step: value and derivative, as functions of z.

`ACTIVATIONS` is the list of their names. `pairs.py` (module types) and `triton/activations.py` (device code) have the
same names, which tests/ops/test_activations.py checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """One activation: `value(z, negative_slope)` and its derivative `slope(z, negative_slope)`.

    At a kink the derivative is the one that PyTorch takes, for example 0 for ReLU at z = 0.
    """

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]


def _silu_slope(z: Tensor, _: float) -> Tensor:
    s = z.sigmoid()
    return s * (1 + z * (1 - s))


def _sigmoid_slope(z: Tensor, _: float) -> Tensor:
    s = z.sigmoid()
    return s * (1 - s)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda z, _: z.relu(), lambda z, _: (~(z <= 0)).to(z.dtype)),
    "relu6": Activation(lambda z, _: F.relu6(z), lambda z, _: (~((z <= 0) | (z >= 6))).to(z.dtype)),
    "leaky_relu": Activation(lambda z, a: F.leaky_relu(z, a), lambda z, a: torch.where(z > 0, torch.ones_like(z), a)),
    "silu": Activation(lambda z, _: F.silu(z), _silu_slope),
    "hardswish": Activation(
        lambda z, _: F.hardswish(z),
        lambda z, _: torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, z / 3 + 0.5)).to(z.dtype),
    ),
    "sigmoid": Activation(lambda z, _: z.sigmoid(), _sigmoid_slope),
    "tanh": Activation(lambda z, _: z.tanh(), lambda z, _: 1 - z.tanh().square()),
}


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Compute activation(z). The empty name is the identity."""
    return ACTIVATIONS[activation].value(z, negative_slope) if activation else z
