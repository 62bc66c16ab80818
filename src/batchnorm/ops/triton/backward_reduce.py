"""backward_reduce: Σdz and Σdz·(x − mean), one a channel and slice; strips first, then their sums in order.

Inside a tile the second sum is of dz·x̂, whose size does not depend on the input's scale.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from .apply import form
from .launch import Plan, as_bytes, ceil_div, plan, run, same_layout, stages, vectors
from .tile import given, incoming, locate, place, rounded, scales, shifts, split, sums_of

MERGE = 16


@triton.jit
def _backward_reduce(
    grad_output, input, mean, var, weight, bias, residual, mask, sums, sums_xmu,
    samples, channels, positions, stride, per_slice, strips, chunks, inner_tiles,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row, part, channel, known, inner, live, base, first, last = locate(
        samples, channels, positions, per_slice, strips, chunks, inner_tiles, LAST, BN, BI
    )
    mu, sigma2 = given(mean, var, row, channels, channel, known)
    high, low = split(mu, COMPUTE)
    invstd, scale = scales(sigma2, weight, channel, known, EPS)
    unit = invstd.to(COMPUTE)
    offset = (low * invstd).to(COMPUTE)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    sum_dy = tl.zeros(channel.shape, tl.float64)
    sum_xhat = tl.zeros(channel.shape, tl.float64)
    for chunk in tl.range(chunks, num_stages=STAGES):
        n = first + chunk * BN + tl.arange(0, BN)
        at, exists = place(n, last, inner, live, base, stride)
        d, grad, _real, _empty = incoming(
            grad_output, input, residual, mask, at, exists, n, last, inner, positions, high, scale, shift,
            ACTIVATION, SLOPE, COMPUTE, LAST,
        )  # fmt: skip
        along, across = sums_of(d, grad, exists, unit, offset, LAST)
        sum_dy += along
        sum_xhat += across
    to = (row * strips * (1 if LAST else inner_tiles) + part) * channels + channel
    tl.store(sums + to, sum_dy, mask=known)
    tl.store(sums_xmu + to, sum_xhat / unit.to(tl.float64), mask=known)


@triton.jit
def _merge_sums(
    part_sums, part_sums_xmu, var, sums, sums_xmu, grad_weight, grad_bias, rows, parts, channels,
    EPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Strips to slices; where they are asked for, slices to the gradients of weight (Σ dz·x̂) and bias (Σ dz)."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    known = channel < channels
    along_weight = tl.zeros((BC,), tl.float64)
    along_bias = tl.zeros((BC,), tl.float64)
    for r in range(rows):
        row = tl.cast(r, tl.int64)
        sum_dy = tl.zeros((BC,), tl.float64)
        sum_xmu = tl.zeros((BC,), tl.float64)
        for start in range(0, parts, BP):
            p = start + tl.arange(0, BP)
            at = (row * parts + p[:, None]) * channels + channel[None, :]
            exists = (p < parts)[:, None] & known[None, :]
            sum_dy += tl.sum(tl.load(part_sums + at, mask=exists, other=0.0), 0)
            sum_xmu += tl.sum(tl.load(part_sums_xmu + at, mask=exists, other=0.0), 0)
        at_row = row * channels + channel
        if sums is not None:
            tl.store(sums + at_row, sum_dy, mask=known)
            tl.store(sums_xmu + at_row, sum_xmu, mask=known)
        if grad_weight is not None:
            variance = tl.load(var + at_row, mask=known, other=1.0).to(tl.float64)
            along_weight += sum_xmu / tl.sqrt(variance + EPS)
        along_bias += sum_dy
    if grad_weight is not None:
        tl.store(grad_weight + channel, rounded(along_weight, grad_weight.dtype.element_ty), mask=known)
    if grad_bias is not None:
        tl.store(grad_bias + channel, rounded(along_bias, grad_bias.dtype.element_ty), mask=known)


def merge_sums(
    partial: tuple[Tensor, Tensor],
    var: Tensor,
    sums: tuple[Tensor, Tensor] | tuple[None, None],
    grads: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> None:
    """(R, P, C) partial sums into (R, C) sums and the gradients of weight and bias, each where there is a tensor."""
    rows, parts, channels = partial[0].shape
    run(
        _merge_sums, ceil_div(channels, MERGE), *partial, var, *sums, *grads, rows, parts, channels,
        EPS=eps, BP=MERGE, BC=MERGE, num_warps=1,
    )  # fmt: skip


def partial_sums(
    grad_output: Tensor,
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    compiled: dict[str, Any],
    cut: Plan,
) -> tuple[Tensor, Tensor]:
    """(R, P, C) sums of dz and dz·(x − mean). All arguments dense, in x's memory order."""
    partial = x.new_empty((2, cut.rows, cut.parts, cut.channels), dtype=torch.float64)
    first, second = partial[0], partial[1]
    arguments = (grad_output, x, *small, residual, mask, first, second)
    run(_backward_reduce, cut.programs, *arguments, *cut.sizes, STAGES=stages(x), **cut.meta(x), **compiled)
    return first, second


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
    x = dense(input)
    cut, small = plan(x, slice_size, reduces=True), vectors(mean, var, weight, bias)
    grad, added = same_layout(grad_output, x), same_layout(residual, x)
    assert grad is not None
    partial = partial_sums(grad, x, small, added, as_bytes(mask), form(eps, activation, negative_slope), cut)
    if cut.parts == 1:
        return partial[0][:, 0], partial[1][:, 0]
    sums = x.new_empty((2, cut.rows, cut.channels), dtype=torch.float64)
    merge_sums(partial, var, (sums[0], sums[1]), (None, None), eps)
    return sums[0], sums[1]
