"""backward_reduce: Σdz and Σdz·(x − mean) of each slice and channel. Each program sums a chunk, a second launch merges.

Inside a tile the second sum is Σdz·x̂, because x̂ does not depend on the scale of the input.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .apply import activation_constants
from .launch import SIZE_ARGUMENTS, TilePlan, as_bytes, ceil_div, contiguous_vectors, make_plan, run, same_layout
from .stats import MERGE_CHANNELS, merge_meta
from .tile import (
    bounds_mask,
    exclude_padding,
    load_moments,
    locate,
    recompute_dz,
    reduce_coefficients,
    rounded,
    row_offsets,
    store_coefficients,
    sum_terms,
    tile_sum,
    valid_elements,
    write,
)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def _backward_reduce(
    grad_output, input, mean, var, weight, bias, residual, mask, sums, sums_xmu, grad_residual,
    rows, channels, pixel_vectors, map_vectors, magic, bits, slice_rows, chunks, tiles, channel_blocks,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    slice_index, chunk, channel, channel_mask, first_row, end_row, tiles = locate(
        rows, channels, slice_rows, chunks, tiles, channel_blocks, NHWC, ROWS, WIDTH
    )
    high, _low, scale, shift, _invstd, rounded_invstd, xhat_shift = reduce_coefficients(
        mean, var, weight, bias, slice_index, channels, channel, channel_mask, EPS, COMPUTE
    )
    tile_dz = tl.zeros((ROWS, WIDTH), COMPUTE)
    tile_dz_xhat = tl.zeros((ROWS, WIDTH), COMPUTE)
    for tile in tl.range(tiles, num_stages=STAGES):
        # from the end, as in `stats`: the next pass begins where this one ends, so it finds those rows in the cache
        n = first_row + (tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)
        offsets = row_offsets(n, channel, pixel_vectors, map_vectors, magic, bits, NHWC, VECTOR, LARGE)
        in_bounds = bounds_mask(n, end_row, channel_mask, NHWC, FULL)
        d, dz = recompute_dz(
            grad_output, input, residual, offsets, in_bounds, high, scale, shift, ACTIVATION, SLOPE, COMPUTE
        )
        if mask is not None:
            valid = valid_elements(mask, n, end_row, in_bounds, NHWC, WIDTH)
            d, dz, _invalid = exclude_padding(d, dz, valid)
        if grad_residual is not None:
            write(grad_residual, offsets, dz, in_bounds)
        dz_term, dz_xhat_term = sum_terms(d, dz, in_bounds, rounded_invstd, xhat_shift)
        tile_dz += dz_term
        tile_dz_xhat += dz_xhat_term
    target = (slice_index * chunks + chunk) * channels + channel
    tl.store(sums + target, tile_sum(tile_dz, NHWC).to(tl.float64), mask=channel_mask)
    tl.store(
        sums_xmu + target,
        tile_sum(tile_dz_xhat, NHWC).to(tl.float64) / rounded_invstd.to(tl.float64),
        mask=channel_mask,
    )


@triton.jit(do_not_specialize=["slices", "chunks", "channels"])
def _merge_sums(
    chunk_sums, chunk_sums_xmu, mean, var, count, weight, bias, sums, sums_xmu, grad_weight, grad_bias, coefficients,
    slices, chunks, channels,
    EPS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Merge the sums of chunks into the sums of slices, and these into the gradients of weight and bias.

    It also computes the coefficients of the next pass. It stores the results for which there is a tensor.
    """
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_mask = channel < channels
    weight_sum = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    bias_sum = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for r in range(slices):
        slice_index = tl.cast(r, tl.int64)
        chunk_dy = tl.zeros((BLOCK_CHUNKS, BLOCK_CHANNELS), tl.float64)
        chunk_dy_xmu = tl.zeros((BLOCK_CHUNKS, BLOCK_CHANNELS), tl.float64)
        for start in range(0, chunks, BLOCK_CHUNKS):
            p = start + tl.arange(0, BLOCK_CHUNKS)
            offsets = (slice_index * chunks + p[:, None]) * channels + channel[None, :]
            in_bounds = (p < chunks)[:, None] & channel_mask[None, :]
            chunk_dy += tl.load(chunk_sums + offsets, mask=in_bounds, other=0.0)
            chunk_dy_xmu += tl.load(chunk_sums_xmu + offsets, mask=in_bounds, other=0.0)
        sum_dy = tl.sum(chunk_dy, 0)
        sum_dy_xmu = tl.sum(chunk_dy_xmu, 0)
        slice_offsets = slice_index * channels + channel
        if sums is not None:
            tl.store(sums + slice_offsets, sum_dy, mask=channel_mask)
            tl.store(sums_xmu + slice_offsets, sum_dy_xmu, mask=channel_mask)
        slice_mean, slice_var = load_moments(mean, var, slice_index, channels, channel, channel_mask)
        weight_sum += sum_dy_xmu / tl.sqrt(slice_var + EPS)
        bias_sum += sum_dy
        if coefficients is not None:
            n = tl.load(count + slice_index).to(tl.float64)
            store_coefficients(
                coefficients, slice_index, channels, channel, channel_mask,
                slice_mean, slice_var, weight, bias, sum_dy, sum_dy_xmu, n, EPS,
            )  # fmt: skip
    if grad_weight is not None:
        tl.store(grad_weight + channel, rounded(weight_sum, grad_weight.dtype.element_ty), mask=channel_mask)
    if grad_bias is not None:
        tl.store(grad_bias + channel, rounded(bias_sum, grad_bias.dtype.element_ty), mask=channel_mask)


def merge_sums(
    partial: tuple[Tensor, Tensor],
    vectors: list[Tensor | None],
    sums: tuple[Tensor, Tensor] | tuple[None, None],
    grads: tuple[Tensor | None, Tensor | None],
    coefs: Tensor | None,
    eps: float,
) -> None:
    """Merge partial sums (R, chunks, C) into sums (R, C), the gradients of weight and bias, and coefficients.

    Args:
        partial: the sums of dz and of dz·(x − mean) of each chunk.
        vectors: mean, var, weight, bias and count. The count is needed for coefficients only.
        sums, grads, coefs: where the results are stored; None for a result that is not wanted.
    """
    mean, var, weight, bias, count = vectors
    slices, chunks, channels = partial[0].shape
    run(
        _merge_sums, ceil_div(channels, MERGE_CHANNELS), *partial, mean, var, count, weight, bias, *sums, *grads, coefs,
        slices, chunks, channels, EPS=eps, **merge_meta(chunks),
    )  # fmt: skip


def launch_backward_reduce(
    grad_output: Tensor,
    x: Tensor,
    vectors: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    constants: dict[str, Any],
    plan: TilePlan,
    eps: float,
    grad_residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the sums of dz and of dz·(x − mean) of each chunk, (R, chunks, C), and store dz in `grad_residual`.

    All tensors are dense and have the layout of x.
    """
    partial = x.new_empty((2, plan.slices, plan.chunks, plan.channels), dtype=torch.float64)
    sums, sums_xmu = partial[0], partial[1]
    arguments = (grad_output, x, *vectors, residual, mask, sums, sums_xmu, grad_residual)
    meta = {"STAGES": 1} | plan.meta(mask)
    run(_backward_reduce, plan.programs, *arguments, *plan.sizes, EPS=eps, **meta, **constants)
    return sums, sums_xmu


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
    plan, vectors = make_plan(x, slice_size, launch.REDUCE), contiguous_vectors(mean, var, weight, bias)
    grad, dense_residual = same_layout(grad_output, x), same_layout(residual, x)
    assert grad is not None
    chunk_sums = launch_backward_reduce(
        grad,
        x,
        vectors,
        dense_residual,
        as_bytes(mask),
        activation_constants(activation, negative_slope),
        plan,
        eps,
    )
    if plan.chunks == 1:
        return chunk_sums[0][:, 0], chunk_sums[1][:, 0]
    sums = x.new_empty((2, plan.slices, plan.channels), dtype=torch.float64)
    merge_sums(chunk_sums, [*vectors, None], (sums[0], sums[1]), (None, None), None, eps)
    return sums[0], sums[1]
