"""The definition of each operator in PyTorch and float64, for every device. It is slow and exact.

The tests compare every kernel with these functions. docs/derivation.md derives the formulas.

Shapes: x is (N, C, S); mean, var, sum_dy and sum_dy_xmu are (R, C) and float64, one row for each of the R ghost
slices (R = 1 without them); count is (R,). `mask` is (N, S) and bool, True at valid pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS, activate
from .layout import dense, flat, per_sample, per_slice


def stats(input: Tensor, mask: Tensor | None, slice_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the batch statistics: mean, biased var and count of the valid values of each slice and channel."""
    x = flat(input).double()
    samples, _, pixels = x.shape
    valid_mask = None if mask is None else mask.unsqueeze(1)
    if mask is None:
        values = x.new_full((samples,), pixels)
    else:
        values = mask.sum(1, dtype=torch.float64)
    count = per_slice(values, slice_size)
    divisor = count.clamp(min=1).unsqueeze(1)
    valid = x if valid_mask is None else torch.where(valid_mask, x, 0.0)
    mean = per_slice(valid.sum(2), slice_size) / divisor
    deviation = x - per_sample(mean, samples, slice_size)
    if valid_mask is not None:  # a selection, because padding may be NaN and 0·NaN is NaN
        deviation = torch.where(valid_mask, deviation, 0.0)
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
    """Compute x − mean, and z = (x − mean)·invstd·weight + bias + residual. Both are (N, C, S) float64."""
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
    """Convert (N, C, S) float64 to the input's shape and dtype, in the layout `dense(input)` has."""
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
    """Compute y = activation((x − mean)·invstd·weight + bias + residual)."""
    _, z = _affine(input, mean, var, weight, bias, residual, eps, slice_size)
    return _like(activate(z, activation, negative_slope), input)


def recompute_input(
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
    """Compute the input from the output of `apply` without a residual.

    x = (activation⁻¹(y) − bias)/weight/invstd + mean.

    Returns:
        The input as float64, in the output's shape and layout.

    Raises:
        ValueError: the activation has no inverse.
    """
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
    """Compute `apply` such that its derivative by autograd is the one of `backward_elemt`.

    Padding that is not finite gets the gradient 0 and adds nothing to other gradients, so it is replaced by a constant.
    """
    if mask is None:
        return apply(input, mean, var, weight, bias, residual, *form)
    invalid = _nonfinite_padding(mask, flat(input)).view(input.shape)
    out = apply(torch.where(invalid, 0.0, input), mean, var, weight, bias, residual, *form)
    weight, bias, residual = (None if t is None else t.detach() for t in (weight, bias, residual))
    constant = apply(input.detach(), mean.detach(), var.detach(), weight, bias, residual, *form)
    return torch.where(invalid, constant, out)


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
    """Compute x − mean, and dz = grad_output·activation′(z).

    z is recomputed, because saving it would take the memory of one more tensor.
    """
    deviation, z = _affine(input, mean, var, weight, bias, residual, eps, slice_size)
    grad = flat(grad_output).double()
    if activation:
        grad = grad * ACTIVATIONS[activation].slope(z, negative_slope)
    return deviation, grad


def _nonfinite_padding(mask: Tensor, values: Tensor) -> Tensor:
    """Return where (N, C, S) is padding that is not finite. It adds nothing to a sum and its gradient is 0."""
    return ~mask.unsqueeze(1) & ~values.isfinite()


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
    """Compute sum_dy = Σ dz and sum_dy_xmu = Σ dz·(x − mean) of each slice and channel, over all finite pixels."""
    deviation, grad = _grad_affine(
        grad_output, input, mean, var, weight, bias, residual, eps, activation, negative_slope, slice_size
    )
    if mask is not None:
        invalid = _nonfinite_padding(mask, deviation)
        deviation, grad = torch.where(invalid, 0.0, deviation), torch.where(invalid, 0.0, grad)
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
    """Compute dx = weight·invstd·(dz − sum_dy/n − (x − mean)·invstd²·sum_dy_xmu/n), and dz for the residual.

    Args:
        count: n of each slice; None where the moments do not depend on x, so dx = weight·invstd·dz.
        need_residual: whether dz is wanted; the second result is empty if not.
    """
    deviation, grad = _grad_affine(
        grad_output, input, mean, var, weight, bias, residual, eps, activation, negative_slope, slice_size
    )
    samples = input.size(0)
    invstd = (_rows(var) + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.double()
    dx = grad
    if count is not None:  # batch statistics depend on x: the gradient through mean and var
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
        invalid = _nonfinite_padding(mask, deviation)
        dx, grad = torch.where(invalid, 0.0, dx), torch.where(invalid, 0.0, grad)
    return _like(dx, input), _like(grad, input) if need_residual else input.new_empty(0)
