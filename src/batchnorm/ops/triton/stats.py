"""stats: each program reduces a chunk to (count, mean, M2), and a second, small launch merges the chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .coefficients import empty_coefficients
from .launch import SIZE_ARGUMENTS, TilePlan, as_bytes, ceil_div, make_plan, power_of_2, run
from .tile import (
    bounds_mask,
    count_valid,
    locate,
    merge_moments,
    read,
    rounded_mean,
    row_offsets,
    select,
    store_coefficients,
    tile_moments,
    tile_sum,
    valid_elements,
)
from .update_running_ import RunningBuffers, split_float, update_buffers

MERGE = 2048  # (chunk, channel) pairs of a merging program at a time
MERGE_CHANNELS = 4  # of a merging program: 32 bytes of float64, the smallest memory access


@triton.jit
def _sampled_mean(
    input, mask, first_row, end_row, channel, channel_mask, pixel_vectors, map_vectors, magic, bits,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the mean of ROWS rows, evenly spaced over the chunk, as a shift near each channel's mean.

    No row is out of bounds; in a short chunk rows are used twice. ROWS is a power of two, so the mean of equal values
    is exactly that value.
    """
    n = first_row + (tl.arange(0, ROWS) * (end_row - first_row)) // ROWS
    offsets = row_offsets(n, channel, pixel_vectors, map_vectors, magic, bits, NHWC, VECTOR, LARGE)
    in_bounds = bounds_mask(n, end_row, channel_mask, NHWC, FULL)
    valid = valid_elements(mask, n, end_row, in_bounds, NHWC, WIDTH)
    x = select(valid, read(input, offsets, in_bounds, COMPUTE))
    values = ROWS if NHWC else ROWS * WIDTH
    # the division comes before the sum, because a sum of values near the largest float32 would overflow
    shift = tile_sum(x * (1.0 / values), NHWC)
    if mask is not None:
        shift = rounded_mean(shift, count_valid(mask, n, end_row, valid, NHWC, WIDTH), values, COMPUTE)
    return shift


@triton.jit
def _robust_moments(
    input, mask, first_row, end_row, tiles, channel, channel_mask, pixel_vectors, map_vectors, magic, bits,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute the mean and M2 of a chunk for values of any size, in twice the time of sums with one shift.

    `tile_moments` computes the moments of each tile, and Chan's formula merges the tiles.
    """
    count = tl.full((), 0.0, tl.float64)
    mean = tl.zeros(channel.shape, tl.float64)
    m2 = tl.zeros(channel.shape, tl.float64)
    for tile in range(tiles):
        n = first_row + tile * ROWS + tl.arange(0, ROWS)
        offsets = row_offsets(n, channel, pixel_vectors, map_vectors, magic, bits, NHWC, VECTOR, LARGE)
        in_bounds = bounds_mask(n, end_row, channel_mask, NHWC, FULL)
        valid = valid_elements(mask, n, end_row, in_bounds, NHWC, WIDTH)
        x = read(input, offsets, in_bounds, COMPUTE)
        tile_count = count_valid(mask, n, end_row, valid, NHWC, WIDTH)
        tile_mean, tile_m2 = tile_moments(x, valid, tile_count, NHWC, ROWS, WIDTH)
        count, mean, m2 = merge_moments(count, mean, m2, tile_count, tile_mean, tile_m2)
    return mean, m2


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def _stats(
    input, mask, counts, means, m2s,
    rows, channels, pixel_vectors, map_vectors, magic, bits, slice_rows, chunks, tiles, channel_blocks,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    slice_index, chunk, channel, channel_mask, first_row, end_row, tiles = locate(
        rows, channels, slice_rows, chunks, tiles, channel_blocks, NHWC, ROWS, WIDTH
    )
    shift = _sampled_mean(
        input, mask, first_row, end_row, channel, channel_mask, pixel_vectors, map_vectors, magic, bits,
        COMPUTE, NHWC, VECTOR, LARGE, FULL, ROWS, WIDTH,
    )  # fmt: skip
    count = tl.full((), 0.0, tl.float64)
    tile_d = tl.zeros((ROWS, WIDTH), COMPUTE)
    tile_d2 = tl.zeros((ROWS, WIDTH), COMPUTE)
    for tile in tl.range(tiles, num_stages=STAGES):
        # from the end: these rows of x were written last and are in the cache; the next pass begins at the other end
        n = first_row + (tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)
        offsets = row_offsets(n, channel, pixel_vectors, map_vectors, magic, bits, NHWC, VECTOR, LARGE)
        in_bounds = bounds_mask(n, end_row, channel_mask, NHWC, FULL)
        valid = valid_elements(mask, n, end_row, in_bounds, NHWC, WIDTH)
        d = select(valid, read(input, offsets, in_bounds, COMPUTE) - shift[None, :])
        tile_d += d
        tile_d2 += d * d
        if mask is not None:
            count += count_valid(mask, n, end_row, valid, NHWC, WIDTH)
    if mask is None:
        count = ((end_row - first_row) * (1 if NHWC else WIDTH)).to(tl.float64)
    inverse_count = 1.0 / tl.maximum(count, 1.0)
    sum_d = tile_sum(tile_d, NHWC).to(tl.float64)
    sum_d2 = tile_sum(tile_d2, NHWC).to(tl.float64)
    mean = shift.to(tl.float64) + sum_d * inverse_count
    m2 = sum_d2 - sum_d * sum_d * inverse_count
    # Few digits canceled and nothing overflowed or underflowed, or all values are equal. NaN fails both tests.
    accurate = (sum_d2 <= 16 * m2) & (sum_d2 >= 1e-30 * count) & (sum_d2 < float("inf"))
    accurate = accurate | ((sum_d2 == 0) & (sum_d == 0))
    if tl.min(accurate.to(tl.int32), 0) == 0:
        mean, m2 = _robust_moments(
            input, mask, first_row, end_row, tiles, channel, channel_mask, pixel_vectors, map_vectors, magic, bits,
            COMPUTE, NHWC, VECTOR, LARGE, FULL, ROWS, WIDTH,
        )  # fmt: skip
    target = (slice_index * chunks + chunk) * channels + channel
    tl.store(counts + target, count, mask=channel_mask)
    tl.store(means + target, mean, mask=channel_mask)
    tl.store(m2s + target, m2, mask=channel_mask)


@triton.jit(do_not_specialize=["chunks", "channels", "channel_blocks"])
def _merge_stats(
    chunk_counts, chunk_means, chunk_m2s, counts, means, variances,
    weight, bias, coefficients, running_mean, running_var, num_batches_tracked, momentum, momentum_low,
    chunks, channels, channel_blocks,
    EPS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    slice_index = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_mask = channel < channels
    count_sum = tl.zeros((BLOCK_CHUNKS, BLOCK_CHANNELS), tl.float64)
    weighted_sum = tl.zeros((BLOCK_CHUNKS, BLOCK_CHANNELS), tl.float64)
    for start in range(0, chunks, BLOCK_CHUNKS):
        p = start + tl.arange(0, BLOCK_CHUNKS)
        offsets = (slice_index * chunks + p[:, None]) * channels + channel[None, :]
        in_bounds = (p < chunks)[:, None] & channel_mask[None, :]
        n = tl.load(chunk_counts + offsets, mask=in_bounds, other=0.0)
        count_sum += n
        weighted_sum += n * tl.load(chunk_means + offsets, mask=in_bounds, other=0.0)
    count = tl.sum(count_sum, 0)
    divisor = tl.maximum(count, 1.0)
    mean = tl.sum(weighted_sum, 0) / divisor
    m2s = tl.zeros((BLOCK_CHUNKS, BLOCK_CHANNELS), tl.float64)
    for start in range(0, chunks, BLOCK_CHUNKS):
        p = start + tl.arange(0, BLOCK_CHUNKS)
        offsets = (slice_index * chunks + p[:, None]) * channels + channel[None, :]
        in_bounds = (p < chunks)[:, None] & channel_mask[None, :]
        n = tl.load(chunk_counts + offsets, mask=in_bounds, other=0.0)
        delta = tl.load(chunk_means + offsets, mask=in_bounds, other=0.0) - mean[None, :]
        delta = tl.where(in_bounds, delta, 0.0)
        m2s += tl.load(chunk_m2s + offsets, mask=in_bounds, other=0.0) + n * delta * delta
    slice_var = tl.sum(m2s, 0) / divisor
    tl.store(means + slice_index * channels + channel, mean, mask=channel_mask)
    tl.store(variances + slice_index * channels + channel, slice_var, mask=channel_mask)
    tl.store(counts + slice_index + channel * 0, count, mask=channel == 0)
    if coefficients is not None:
        store_coefficients(
            coefficients, slice_index, channels, channel, channel_mask,
            mean, slice_var, weight, bias, None, None, None, EPS,
        )  # fmt: skip
    if running_mean is not None or running_var is not None or num_batches_tracked is not None:
        update_buffers(
            running_mean, running_var, num_batches_tracked, mean, slice_var, count, momentum, momentum_low,
            channel, channel_mask,
        )  # fmt: skip


def merge_meta(chunks: int) -> dict[str, int]:
    """Choose how many chunks a merging program loads at a time: all, up to a limit."""
    together = min(power_of_2(chunks), MERGE // MERGE_CHANNELS)
    warps = max(1, min(8, together * MERGE_CHANNELS // 128))
    return {"BLOCK_CHUNKS": together, "BLOCK_CHANNELS": MERGE_CHANNELS, "num_warps": warps}


def launch_stats(
    x: Tensor,
    mask: Tensor | None,
    plan: TilePlan,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float | None = None,
    buffers: RunningBuffers = (None, None, None),
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the batch statistics of a dense tensor, and update the buffers that are given.

    Args:
        affine: weight and bias, for the coefficients.
        eps: None: no coefficients.
        buffers: running_mean, running_var and num_batches_tracked, only where there is one slice.

    Returns:
        mean (R, C), var (R, C) and count (R,), float64, and the coefficients of `apply`.
    """
    partial = x.new_empty((3, plan.slices, plan.chunks, plan.channels), dtype=torch.float64)
    run(_stats, plan.programs, x, mask, *partial, *plan.sizes, **{"STAGES": 1} | plan.meta(mask))
    mean = partial.new_empty((plan.slices, plan.channels))
    var, count = torch.empty_like(mean), mean.new_empty(plan.slices)
    channel_blocks = ceil_div(plan.channels, MERGE_CHANNELS)
    coefs = None if eps is None else empty_coefficients(x, plan.slices)
    run(
        _merge_stats, plan.slices * channel_blocks, *partial, count, mean, var, *affine, coefs, *buffers,
        *split_float(momentum), plan.chunks, plan.channels, channel_blocks, EPS=eps or 0.0, **merge_meta(plan.chunks),
    )  # fmt: skip
    return mean, var, count, coefs


def stats(input: Tensor, mask: Tensor | None, slice_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(input)
    return launch_stats(x, as_bytes(mask), make_plan(x, slice_size, launch.STATS))[:3]
