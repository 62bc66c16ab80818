"""Batch normalizations that are none of torch's classes: torchvision's frozen one and its many copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["frozen_eps", "holds_statistics"]

_HELD = {"weight", "bias", "running_mean", "running_var"}


def holds_statistics(module: nn.Module) -> bool:
    """Whether the module keeps running statistics of its own, though it is no normalization of torch's."""
    return not isinstance(module, _NormBase) and _HELD - {"weight", "bias"} <= set(module._buffers.keys())


def frozen_eps(module: nn.Module) -> float | None:
    """ε of a `FrozenBatchNorm2d` (also `DetrFrozenBatchNorm2d`, …) whose four vectors are buffers, with or without a
    counter; None for any other module, and for one that computes something else.

    Some of them keep ε as a number inside their forward. A copy is asked for it: with γ = 1 and all else 0 it turns 1
    into 1/√ε. Another copy, with values drawn at random, then has to agree with the formula.
    """
    held = {name for name, buffer in module._buffers.items() if buffer is not None}
    if not type(module).__name__.endswith("FrozenBatchNorm2d") or isinstance(module, _NormBase):
        return None
    if held - {"num_batches_tracked"} != _HELD:  # detectron2's converter hands the counter on
        return None
    try:
        eps = getattr(module, "eps", None) or _asked(module)
        return float(eps) if _agrees(module, float(eps)) else None
    except Exception:  # a forward that takes no image: another kind of module
        return None


def _trial(module: nn.Module, values: dict[str, Tensor], x: Tensor) -> Tensor:
    trial: Any = copy.deepcopy(module)
    for name, value in values.items():
        trial._buffers[name] = value
    with torch.no_grad():
        result: Tensor = trial(x)
    return result


def _asked(module: nn.Module) -> float:
    values = {name: torch.zeros(1, dtype=torch.float64) for name in _HELD} | {"weight": torch.ones(1).double()}
    return float(f"{_trial(module, values, torch.ones(1, 1, 1, 1).double()).item() ** -2:.6g}")


def _agrees(module: nn.Module, eps: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(3, generator=generator, dtype=torch.float64) for name in sorted(_HELD)}
    values["running_var"] *= 10 * eps  # else ε would not show
    x = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    form = {name: value.view(3, 1, 1) for name, value in values.items()}
    wanted = (x - form["running_mean"]) * (form["running_var"] + eps).rsqrt() * form["weight"] + form["bias"]
    return bool(torch.allclose(_trial(module, values, x), wanted, rtol=1e-5, atol=1e-5))
