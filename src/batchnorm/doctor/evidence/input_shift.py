"""Whether one scale and one shift of the network's input explain what the first normalization sees.

With x′ = u·x + v as the input, the first normalization's moments are functions of u and v. Gauss-Newton finds the pair
that brings them to the running statistics; only the part of the network before that normalization runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .normalizations import Layer

__all__ = ["InputShift", "find_input_shift"]

# (u, v) → mean and variance of the layer's input, (C,) each
Response = Callable[[float, float], tuple[Tensor, Tensor]]

_STEPS, _PARTS = 10, (1.0, 0.5, 0.1)
# Smallest number of channels with which two numbers could not explain anything.
_CHANNELS = 3
# Share of the difference that has to go, and of the channels that may stay away.
_EXPLAINED, _LEFT = 0.9, 0.1


@dataclass(frozen=True)
class InputShift:
    """The batches are `scale`·x + `shift` of inputs x that have the layer's running statistics."""

    layer: Layer
    scale: float
    shift: float
    explained: float


def find_input_shift(layer: Layer, response: Response) -> InputShift | None:
    """Return the scale and the shift; None where they do not explain the difference."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    if layer.running_mean.numel() < _CHANNELS:
        return None
    mean, var = layer.running_mean.detach().double().cpu(), layer.running_var.detach().double().cpu()
    std = (var + layer.eps).sqrt()

    def residual(at: Tensor) -> Tensor:
        seen_mean, seen_var = response(float(at[0]), float(at[1]))
        seen_std = (seen_var.double().cpu() + layer.eps).sqrt()
        return torch.cat([(seen_mean.double().cpu() - mean) / std, (seen_std - std) / std])

    at = torch.tensor([1.0, 0.0], dtype=torch.float64)
    before = now = residual(at)
    for _ in range(_STEPS):
        step = _step(residual, at, now)
        if step is None:
            return None
        for part in _PARTS:  # an activation before the layer bends the way
            after = residual(at + part * step)
            if after.isfinite().all() and after.square().sum() < now.square().sum():
                break
        else:
            break
        done = now.square().sum() - after.square().sum() < 1e-4 * before.square().sum()
        at, now = at + part * step, after
        if done:
            break
    explained = 1 - float(now.square().sum() / before.square().sum().clamp(min=1e-30))
    away = (now.view(2, -1).abs() > torch.tensor([[0.3], [0.35]])).any(0).double().mean()
    if at[0] <= 0 or explained < _EXPLAINED or away > _LEFT:
        return None
    return InputShift(layer, float(1 / at[0]), float(-at[1] / at[0]), explained)


def _step(residual: Callable[[Tensor], Tensor], at: Tensor, now: Tensor) -> Tensor | None:
    """Return the step of Gauss-Newton; None where the moments do not follow the input."""
    sizes = (0.01 * max(abs(float(at[0])), 1e-3), 0.01 * max(abs(float(at[1])), abs(float(at[0])), 1e-3))
    columns = []
    for axis, size in enumerate(sizes):
        moved = at.clone()
        moved[axis] += size
        columns.append((residual(moved) - now) / size)
    jacobian = torch.stack(columns, 1)
    if not jacobian.isfinite().all() or float(jacobian.abs().max(0).values.min()) < 1e-9:
        return None
    return -torch.linalg.lstsq(jacobian, now[:, None]).solution[:, 0]
