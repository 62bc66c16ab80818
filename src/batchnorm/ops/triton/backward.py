"""backward = backward_reduce, then backward_elemt; one launch where a channel of a slice fits one tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .apply import form
from .backward_elemt import elemt
from .backward_reduce import merge_sums, partial_sums
from .coefficients import coefficients, room
from .launch import SIZES, Plan, as_bytes, plan, run, same_layout, vectors
from .tile import (
    given,
    holes,
    incoming,
    inside,
    locate,
    place,
    products_of,
    real_positions,
    rounded,
    scales,
    shifts,
    slope_terms,
    split,
    store_gradients,
    total,
)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    grad_output, input, mean, var, weight, bias, residual, mask, count,
    grad_input, grad_residual, grad_weight, grad_bias, sums, sums_xmu,
    samples, channels, units, vectors, magic, bits, per_slice, strips, chunks, tiles,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    row, _strip, channel, known, first, last, _ = locate(
        samples, channels, per_slice, strips, chunks, tiles, LAST, BN, BI
    )
    mu, sigma2 = given(mean, var, row, channels, channel, known)
    high, low = split(mu, COMPUTE)
    invstd, scale = scales(sigma2, weight, channel, known, EPS)
    unit = invstd.to(COMPUTE)
    offset = (low * invstd).to(COMPUTE)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    n = first + tl.arange(0, BN)
    at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
    exists = inside(n, last, known, LAST, EVEN)
    d, grad = incoming(grad_output, input, residual, at, exists, high, scale, shift, ACTIVATION, SLOPE, COMPUTE)
    real = exists
    empty = None
    if mask is not None:
        real = real_positions(mask, n, last, exists, LAST, BI)
        empty = holes(d, real)
        grad = tl.where(empty, 0.0, grad)
        d = tl.where(empty, 0.0, d)
    dz, product = products_of(d, grad, exists, unit, offset)
    sum_dy = total(dz, LAST).to(tl.float64)
    sum_xmu = total(product, LAST).to(tl.float64) / unit.to(tl.float64)
    if sums is not None:  # several slices: their sums are added in a launch of their own
        tl.store(sums + row * channels + channel, sum_dy, mask=known)
        tl.store(sums_xmu + row * channels + channel, sum_xmu, mask=known)
    if grad_weight is not None:
        tl.store(grad_weight + channel, rounded(sum_xmu * invstd, grad_weight.dtype.element_ty), mask=known)
    if grad_bias is not None:
        tl.store(grad_bias + channel, rounded(sum_dy, grad_bias.dtype.element_ty), mask=known)
    along = None
    across = None
    if count is not None:
        along, across = slope_terms(sum_dy, sum_xmu, invstd, low, tl.load(count + row).to(tl.float64), COMPUTE)
    store_gradients(grad_input, grad_residual, at, exists, d, grad, real, empty, scale, along, across)


Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _one_launch(
    grad_output: Tensor,
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    found: Outputs,
    compiled: dict[str, Any],
    eps: float,
    cut: Plan,
) -> None:
    """Fill `found` (grad_input, grad_weight, grad_bias, grad_residual). `small` ends with the count."""
    grad_input, grad_weight, grad_bias, grad_residual = found
    sums: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    affine: tuple[Tensor | None, Tensor | None] = (grad_weight, grad_bias)
    apart = cut.rows > 1 and (grad_weight is not None or grad_bias is not None)
    if apart:
        both = x.new_empty((2, cut.rows, 1, cut.channels), dtype=torch.float64)
        sums, affine = (both[0], both[1]), (None, None)
    arguments = (grad_output, x, *small[:4], residual, mask, small[4], grad_input, grad_residual, *affine, *sums)
    run(_backward, cut.programs, *arguments, *cut.sizes, EPS=eps, **cut.meta(mask), **compiled)
    if apart:
        assert sums[0] is not None
        merge_sums(sums, small, (None, None), (grad_weight, grad_bias), None, eps)


# Activations whose derivative is 0 or 1, so that dz rounds to itself
EXACT = ("relu", "relu6")


def _in_turn(
    grad_output: Tensor,
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    found: Outputs,
    compiled: dict[str, Any],
    eps: float,
    slice_size: int,
) -> None:
    """As `_one_launch`, by the primitives: a pass for the sums, where anything needs them, and one for dx."""
    grad_input, grad_weight, grad_bias, grad_residual = found
    through = grad_input is not None and small[4] is not None
    coefs = None
    if grad_weight is not None or grad_bias is not None or through:
        cut, dz = plan(x, slice_size, launch.REDUCE), grad_residual if compiled["ACTIVATION"] in EXACT else None
        partial = partial_sums(grad_output, x, small[:4], residual, mask, compiled, cut, eps, dz)
        coefs = room(x, cut.rows) if through else None
        merge_sums(partial, small, (None, None), (grad_weight, grad_bias), coefs, eps)
        if dz is not None:  # which is then read in the place of grad_output and the residual
            grad_output, residual, grad_residual, compiled = dz, None, None, form("", 0.0)
    if grad_input is not None or grad_residual is not None:
        if coefs is None:
            coefs = coefficients(x, small[:4], (None, None), None, eps)
        outputs = (grad_input, grad_residual)
        elemt(grad_output, x, coefs, residual, mask, through, outputs, compiled, slice_size)


def backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(input)
    grad, added = same_layout(grad_output, x), same_layout(residual, x)
    assert grad is not None
    like = (x, weight, bias, x)
    wanted = [
        torch.empty_like(t) if want and t is not None else None for t, want in zip(like, output_mask, strict=True)
    ]
    found: Outputs = (wanted[0], wanted[1], wanted[2], wanted[3])
    small, bytes_ = vectors(mean, var, weight, bias, count), as_bytes(mask)
    compiled, cut = form(activation, negative_slope), plan(x, slice_size, launch.REDUCE)
    if cut.fused:
        _one_launch(grad, x, small, added, bytes_, found, compiled, eps, cut)
    else:
        _in_turn(grad, x, small, added, bytes_, found, compiled, eps, slice_size)
    empty = input.new_empty(0)
    filled = [empty if t is None else t for t in found]
    return filled[0], filled[1], filled[2], filled[3]
