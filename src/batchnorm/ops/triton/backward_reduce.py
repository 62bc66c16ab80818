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
from . import launch
from .apply import form
from .launch import SIZES, Plan, as_bytes, ceil_div, plan, run, same_layout, vectors
from .stats import MERGE_CHANNELS, merge_meta
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
    split,
    store_coefficients,
    total,
    write,
)


@triton.jit(do_not_specialize=SIZES)
def _backward_reduce(
    grad_output, input, mean, var, weight, bias, residual, mask, sums, sums_xmu, grad_residual,
    samples, channels, units, vectors, magic, bits, per_slice, strips, chunks, tiles,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, strip, channel, known, first, last, chunks = locate(
        samples, channels, per_slice, strips, chunks, tiles, LAST, BN, BI
    )
    mu, sigma2 = given(mean, var, row, channels, channel, known)
    high, low = split(mu, COMPUTE)
    invstd, scale = scales(sigma2, weight, channel, known, EPS)
    unit = invstd.to(COMPUTE)
    offset = (low * invstd).to(COMPUTE)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    along = tl.zeros((BN, BI), COMPUTE)
    across = tl.zeros((BN, BI), COMPUTE)
    for chunk in tl.range(chunks, num_stages=STAGES):
        # from the end, as stats: the next pass begins where this one ends
        n = first + (chunks - 1 - chunk) * BN + tl.arange(0, BN)
        at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
        exists = inside(n, last, known, LAST, EVEN)
        d, grad = incoming(grad_output, input, residual, at, exists, high, scale, shift, ACTIVATION, SLOPE, COMPUTE)
        if mask is not None:
            empty = holes(d, real_positions(mask, n, last, exists, LAST, BI))
            grad = tl.where(empty, 0.0, grad)
            d = tl.where(empty, 0.0, d)
        if grad_residual is not None:
            write(grad_residual, at, grad, exists)
        dz, product = products_of(d, grad, exists, unit, offset)
        along += dz
        across += product
    to = (row * strips + strip) * channels + channel
    tl.store(sums + to, total(along, LAST).to(tl.float64), mask=known)
    tl.store(sums_xmu + to, total(across, LAST).to(tl.float64) / unit.to(tl.float64), mask=known)


@triton.jit(do_not_specialize=["rows", "parts", "channels"])
def _merge_sums(
    part_sums, part_sums_xmu, mean, var, count, weight, bias, sums, sums_xmu, grad_weight, grad_bias, coefficients,
    rows, parts, channels,
    EPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Strips to slices, and slices to the gradients of weight (Σ dz·x̂) and bias (Σ dz), each where there is room.

    And the coefficients of the pass that follows.
    """
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    known = channel < channels
    along_weight = tl.zeros((BC,), tl.float64)
    along_bias = tl.zeros((BC,), tl.float64)
    for r in range(rows):
        row = tl.cast(r, tl.int64)
        sums_dy = tl.zeros((BP, BC), tl.float64)
        sums_dy_xmu = tl.zeros((BP, BC), tl.float64)
        for start in range(0, parts, BP):
            p = start + tl.arange(0, BP)
            at = (row * parts + p[:, None]) * channels + channel[None, :]
            exists = (p < parts)[:, None] & known[None, :]
            sums_dy += tl.load(part_sums + at, mask=exists, other=0.0)
            sums_dy_xmu += tl.load(part_sums_xmu + at, mask=exists, other=0.0)
        sum_dy = tl.sum(sums_dy, 0)
        sum_xmu = tl.sum(sums_dy_xmu, 0)
        at_row = row * channels + channel
        if sums is not None:
            tl.store(sums + at_row, sum_dy, mask=known)
            tl.store(sums_xmu + at_row, sum_xmu, mask=known)
        mu, sigma2 = given(mean, var, row, channels, channel, known)
        along_weight += sum_xmu / tl.sqrt(sigma2 + EPS)
        along_bias += sum_dy
        if coefficients is not None:
            n = tl.load(count + row).to(tl.float64)
            store_coefficients(
                coefficients, row, channels, channel, known, mu, sigma2, weight, bias, sum_dy, sum_xmu, n, EPS
            )  # fmt: skip
    if grad_weight is not None:
        tl.store(grad_weight + channel, rounded(along_weight, grad_weight.dtype.element_ty), mask=known)
    if grad_bias is not None:
        tl.store(grad_bias + channel, rounded(along_bias, grad_bias.dtype.element_ty), mask=known)


def merge_sums(
    partial: tuple[Tensor, Tensor],
    small: list[Tensor | None],
    sums: tuple[Tensor, Tensor] | tuple[None, None],
    grads: tuple[Tensor | None, Tensor | None],
    found: Tensor | None,
    eps: float,
) -> None:
    """(R, P, C) partial sums into (R, C) sums, the gradients of weight and bias, and coefficients, where there is room.

    `small`: mean, var, weight, bias and, where there are coefficients to find, the count.
    """
    mean, var, weight, bias, count = small
    rows, parts, channels = partial[0].shape
    run(
        _merge_sums, ceil_div(channels, MERGE_CHANNELS), *partial, mean, var, count, weight, bias, *sums, *grads, found,
        rows, parts, channels, EPS=eps, **merge_meta(parts),
    )  # fmt: skip


def partial_sums(
    grad_output: Tensor,
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    compiled: dict[str, Any],
    cut: Plan,
    eps: float,
    grad_residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(R, P, C) sums of dz and dz·(x − mean), and dz where there is a tensor for it.

    All arguments dense, in x's memory order.
    """
    partial = x.new_empty((2, cut.rows, cut.strips, cut.channels), dtype=torch.float64)
    first, second = partial[0], partial[1]
    arguments = (grad_output, x, *small, residual, mask, first, second, grad_residual)
    meta = {"STAGES": 1} | cut.meta(mask)
    run(_backward_reduce, cut.programs, *arguments, *cut.sizes, EPS=eps, **meta, **compiled)
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
    cut, small = plan(x, slice_size, launch.REDUCE), vectors(mean, var, weight, bias)
    grad, added = same_layout(grad_output, x), same_layout(residual, x)
    assert grad is not None
    partial = partial_sums(grad, x, small, added, as_bytes(mask), form(activation, negative_slope), cut, eps)
    if cut.strips == 1:
        return partial[0][:, 0], partial[1][:, 0]
    sums = x.new_empty((2, cut.rows, cut.channels), dtype=torch.float64)
    merge_sums(partial, [*small, None], (sums[0], sums[1]), (None, None), None, eps)
    return sums[0], sums[1]
