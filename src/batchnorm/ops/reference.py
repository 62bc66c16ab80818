"""The meaning of each operator, in plain PyTorch and float64: slow, exact, on any device.

The derivation is in docs/derivation.md. Every kernel is held against these functions.
x is (N, C, S); moments and sums are (R, C) float64, one row a ghost slice (R = 1 for the whole batch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS, activate
from .layout import dense, flat, per_sample, per_slice


def stats(input: Tensor, mask: Tensor | None, slice_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = flat(input).double()
    samples, _, positions = x.shape
    select = None if mask is None else mask.unsqueeze(1)
    if mask is None:
        values = x.new_full((samples,), positions)
    else:
        values = mask.sum(1, dtype=torch.float64)
    count = per_slice(values, slice_size)
    divisor = count.clamp(min=1).unsqueeze(1)
    real = x if select is None else torch.where(select, x, 0.0)
    mean = per_slice(real.sum(2), slice_size) / divisor
    deviation = x - per_sample(mean, samples, slice_size)
    if select is not None:  # padding may hold NaN: choose, do not multiply
        deviation = torch.where(select, deviation, 0.0)
    var = per_slice(deviation.square().sum(2), slice_size) / divisor
    return mean, var, count


def _rows(moment: Tensor) -> Tensor:
    return moment.double().reshape(-1, moment.size(-1))


def _channels(vector: Tensor) -> Tensor:
    return vector.double().view(1, -1, 1)


def _affine(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slice_size: int,
) -> tuple[Tensor, Tensor]:
    """x − mean, and z = (x − mean)·invstd·weight + bias + residual."""
    x = flat(input).double()
    invstd = per_sample((_rows(var) + eps).rsqrt(), x.size(0), slice_size)
    deviation = x - per_sample(_rows(mean), x.size(0), slice_size)
    z = deviation * invstd
    if weight is not None:
        z = z * _channels(weight)
    if bias is not None:
        z = z + _channels(bias)
    if residual is not None:
        z = z + flat(residual).double()
    return deviation, z


def _like(values: Tensor, input: Tensor) -> Tensor:
    """(N, C, S) float64 in the shape, dtype and layout that the input's result has."""
    return torch.empty_like(dense(input)).copy_(values.view(input.shape))


def apply(
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
    _, z = _affine(input, mean, var, weight, bias, residual, eps, slice_size)
    return _like(activate(z, activation, negative_slope), input)


def restored(
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
) -> Tensor:
    """The float64 input of which `apply` without a residual made this output, for an activation that can be undone."""
    if activation not in ("", "leaky_relu") or (activation and negative_slope <= 0):
        raise ValueError(f"{activation} with slope {negative_slope} cannot be undone from its output")
    z = flat(out).double()
    if activation:
        z = torch.where(z < 0, z / negative_slope, z)
    if bias is not None:
        z = z - _channels(bias)
    if weight is not None:
        z = z / _channels(weight)
    deviation = z * per_sample((_rows(var) + eps).sqrt(), z.size(0), slice_size)
    x = deviation + per_sample(_rows(mean), z.size(0), slice_size)
    return torch.empty_like(dense(out), dtype=torch.float64).copy_(x.view(out.shape))


def apply_around_padding(
    input: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *form: Any,
) -> Tensor:
    """`apply`, of which autograd derives what `backward_elemt` gives: padding that is not finite has no gradient."""
    if mask is None:
        return apply(input, mean, var, weight, bias, residual, *form)
    hole = (~mask.unsqueeze(1) & ~flat(input).isfinite()).view(input.shape)
    out = apply(torch.where(hole, 0.0, input), mean, var, weight, bias, residual, *form)
    weight, bias, residual = (None if t is None else t.detach() for t in (weight, bias, residual))
    constant = apply(input.detach(), mean.detach(), var.detach(), weight, bias, residual, *form)
    return torch.where(hole, constant, out)


def _grad_affine(
    grad_output: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """x − mean, and dz = grad_output · activation'(z), z computed anew rather than saved."""
    deviation, z = _affine(input, mean, var, weight, bias, residual, eps, slice_size)
    grad = flat(grad_output).double()
    if activation:
        grad = grad * ACTIVATIONS[activation].slope(z, negative_slope)
    return deviation, grad


def _padding(mask: Tensor, deviation: Tensor) -> Tensor:
    """Masked positions whose value is not finite: they give nothing and receive nothing."""
    return ~mask.unsqueeze(1) & ~deviation.isfinite()


def backward_reduce(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
) -> tuple[Tensor, Tensor]:
    deviation, grad = _grad_affine(
        grad_output, input, mean, var, weight, bias, residual, eps, activation, negative_slope, slice_size
    )
    if mask is not None:
        hole = _padding(mask, deviation)
        deviation, grad = torch.where(hole, 0.0, deviation), torch.where(hole, 0.0, grad)
    sum_dy = per_slice(grad.sum(2), slice_size)
    sum_dy_xmu = per_slice((grad * deviation).sum(2), slice_size)
    return sum_dy, sum_dy_xmu


def backward_elemt(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    sum_dy: Tensor | None,
    sum_dy_xmu: Tensor | None,
    count: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    deviation, grad = _grad_affine(
        grad_output, input, mean, var, weight, bias, residual, eps, activation, negative_slope, slice_size
    )
    samples = input.size(0)
    invstd = (_rows(var) + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.double()
    dx = grad
    if count is not None:  # the batch's own statistics: the gradient through mean and var
        assert sum_dy is not None
        assert sum_dy_xmu is not None
        divisor = count.clamp(min=1).unsqueeze(1)
        through_mean = per_sample(sum_dy / divisor, samples, slice_size)
        through_var = deviation * per_sample(sum_dy_xmu / divisor * invstd.square(), samples, slice_size)
        dx = grad - through_mean - through_var
        if mask is not None:
            dx = torch.where(mask.unsqueeze(1), dx, grad)
    dx = dx * per_sample(scale, samples, slice_size)
    if mask is not None:
        hole = _padding(mask, deviation)
        dx, grad = torch.where(hole, 0.0, dx), torch.where(hole, 0.0, grad)
    return _like(dx, input), _like(grad, input) if need_residual else input.new_empty(0)
