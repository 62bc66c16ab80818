"""The same function in differentiable aten operators: for derivatives of any order, forward mode and vmap."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import activate
from .layout import flat, per_sample, per_slice


def differentiable_moments(
    input: Tensor, mask: Tensor | None, slice_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`stats` through which autograd can go: (R, C) mean and var, (R,) count; float64."""
    x = flat(input).double()
    samples, _, positions = x.shape
    if mask is None:
        count = per_slice(x.new_full((samples,), positions), slice_size)
        select = None
    else:
        count = per_slice(mask.sum(1, dtype=torch.float64), slice_size)
        select = mask.unsqueeze(1)
        x = torch.where(select, x, 0.0)
    divisor = count.clamp(min=1).unsqueeze(1)
    mean = per_slice(x.sum(2), slice_size) / divisor
    deviation = x - per_sample(mean, samples, slice_size)
    if select is not None:
        deviation = torch.where(select, deviation, 0.0)
    return mean, per_slice(deviation.square().sum(2), slice_size) / divisor, count


def differentiable_apply(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
) -> Tensor:
    """`apply` through which autograd can go, as often as wanted."""
    x = flat(input).double()
    invstd = (var.double().reshape(-1, var.size(-1)) + eps).rsqrt()
    z = x - per_sample(mean.double().reshape(-1, mean.size(-1)), x.size(0), slice_size)
    z = z * per_sample(invstd, x.size(0), slice_size)
    if weight is not None:
        z = z * weight.double().view(1, -1, 1)
    if bias is not None:
        z = z + bias.double().view(1, -1, 1)
    if residual is not None:
        z = z + flat(residual).double()
    return activate(z, activation, negative_slope).view(input.shape).to(input.dtype)
