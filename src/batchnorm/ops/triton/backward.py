"""backward = backward_reduce, then backward_elemt; one launch where a channel of a slice fits one tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from .apply import form
from .backward_elemt import elemt
from .backward_reduce import merge_sums, partial_sums
from .launch import Plan, as_bytes, plan, run, same_layout, vectors
from .tile import given, incoming, locate, place, rounded, scales, shifts, slope_terms, split, store_gradients, sums_of


@triton.jit
def _backward(
    grad_output, input, mean, var, weight, bias, residual, mask, count,
    grad_input, grad_residual, grad_weight, grad_bias, sums, sums_xmu,
    samples, channels, positions, stride, per_slice, strips, chunks, inner_tiles,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    row, _part, channel, known, inner, live, base, first, last = locate(
        samples, channels, positions, per_slice, strips, chunks, inner_tiles, LAST, BN, BI
    )
    mu, sigma2 = given(mean, var, row, channels, channel, known)
    high, low = split(mu, COMPUTE)
    invstd, scale = scales(sigma2, weight, channel, known, EPS)
    unit = invstd.to(COMPUTE)
    offset = (low * invstd).to(COMPUTE)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    n = first + tl.arange(0, BN)
    at, exists = place(n, last, inner, live, base, stride)
    d, grad, real, empty = incoming(
        grad_output, input, residual, mask, at, exists, n, last, inner, positions, high, scale, shift,
        ACTIVATION, SLOPE, COMPUTE, LAST,
    )  # fmt: skip
    sum_dy, sum_xhat = sums_of(d, grad, exists, unit, offset, LAST)
    sum_xmu = sum_xhat / unit.to(tl.float64)
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
    store_gradients(grad_input, grad_residual, at, exists, d, grad, real, empty, scale, along, across, mask is not None)


Outputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _one_launch(
    grad_output: Tensor,
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    found: Outputs,
    compiled: dict[str, Any],
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
    run(_backward, cut.programs, *arguments, *cut.sizes, **cut.meta(x), **compiled)
    if apart:
        assert sums[0] is not None
        assert small[1] is not None
        merge_sums(sums, small[1], (None, None), (grad_weight, grad_bias), compiled["EPS"])


def _in_turn(
    grad_output: Tensor,
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    found: Outputs,
    compiled: dict[str, Any],
    cut: Plan,
    slice_size: int,
) -> None:
    """As `_one_launch`, by the primitives: a pass for the sums, where anything needs them, and one for dx."""
    grad_input, grad_weight, grad_bias, grad_residual = found
    var, count = small[1], small[4]
    sums: tuple[Tensor | None, Tensor | None] = (None, None)
    through_moments = grad_input is not None and count is not None
    if grad_weight is not None or grad_bias is not None or through_moments:
        assert var is not None
        partial = partial_sums(grad_output, x, small[:4], residual, mask, compiled, cut)
        whole = x.new_empty((2, cut.rows, cut.channels), dtype=torch.float64)
        merge_sums(partial, var, (whole[0], whole[1]), (grad_weight, grad_bias), compiled["EPS"])
        sums = (whole[0], whole[1])
    if grad_input is not None or grad_residual is not None:
        count = count if through_moments else None  # without sums there is nothing to take away
        elemt(grad_output, x, small[:4], residual, mask, sums, count, (grad_input, grad_residual), compiled, slice_size)


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
    compiled, cut = form(eps, activation, negative_slope), plan(x, slice_size, reduces=True)
    if cut.fused:
        _one_launch(grad, x, small, added, bytes_, found, compiled, cut)
    else:
        _in_turn(grad, x, small, added, bytes_, found, compiled, cut, slice_size)
    empty = input.new_empty(0)
    filled = [empty if t is None else t for t in found]
    return filled[0], filled[1], filled[2], filled[3]
