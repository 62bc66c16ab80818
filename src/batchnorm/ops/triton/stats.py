"""stats: each program reduces a strip to (count, mean, M2); a second, tiny launch merges a channel's strips."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from .launch import Plan, as_bytes, ceil_div, plan, run, stages
from .tile import counted, locate, merged, moments, place, real_positions

MERGE = 16  # channels that a merging program takes, and parts that it takes at a time


@triton.jit
def _stats(
    input, mask, counts, means, seconds,
    samples, channels, positions, stride, per_slice, strips, chunks, inner_tiles,
    PARTS: tl.constexpr, COMPUTE: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row, part, channel, known, inner, live, base, first, last = locate(
        samples, channels, positions, per_slice, strips, chunks, inner_tiles, LAST, BN, BI
    )
    count = tl.full((), 0.0, tl.float64)
    mean = tl.zeros(channel.shape, tl.float64)
    second = tl.zeros(channel.shape, tl.float64)
    for chunk in tl.range(chunks, num_stages=STAGES):
        n = first + chunk * BN + tl.arange(0, BN)
        at, exists = place(n, last, inner, live, base, stride)
        real = real_positions(mask, n, last, inner, exists, positions, LAST)
        x = tl.load(input + at, mask=exists, other=0.0).to(COMPUTE)
        tile_count = counted(mask, n, last, live, real, LAST)
        tile_mean, tile_second = moments(x, real, tile_count, LAST, BN, BI)
        count, mean, second = merged(count, mean, second, tile_count, tile_mean, tile_second)
    if PARTS:
        to = (row * strips * (1 if LAST else inner_tiles) + part) * channels + channel
        tl.store(counts + to, count, mask=known)
    else:
        to = row * channels + channel
        second = second / tl.maximum(count, 1.0)
        tl.store(counts + row + channel * 0, count, mask=channel == 0)
    tl.store(means + to, mean, mask=known)
    tl.store(seconds + to, second, mask=known)


@triton.jit
def _merge_stats(
    part_counts, part_means, part_seconds, counts, means, variances, parts, channels, channel_tiles,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // channel_tiles).to(tl.int64)
    channel = (tl.program_id(0) % channel_tiles) * BC + tl.arange(0, BC)
    known = channel < channels
    count = tl.zeros((BC,), tl.float64)
    mean = tl.zeros((BC,), tl.float64)
    for start in range(0, parts, BP):
        p = start + tl.arange(0, BP)
        at = (row * parts + p[:, None]) * channels + channel[None, :]
        exists = (p < parts)[:, None] & known[None, :]
        n = tl.load(part_counts + at, mask=exists, other=0.0)
        count += tl.sum(n, 0)
        mean += tl.sum(n * tl.load(part_means + at, mask=exists, other=0.0), 0)
    divisor = tl.maximum(count, 1.0)
    mean = mean / divisor
    second = tl.zeros((BC,), tl.float64)
    for start in range(0, parts, BP):
        p = start + tl.arange(0, BP)
        at = (row * parts + p[:, None]) * channels + channel[None, :]
        exists = (p < parts)[:, None] & known[None, :]
        n = tl.load(part_counts + at, mask=exists, other=0.0)
        apart = tl.load(part_means + at, mask=exists, other=0.0) - mean[None, :]
        apart = tl.where(exists, apart, 0.0)
        second += tl.sum(tl.load(part_seconds + at, mask=exists, other=0.0) + n * apart * apart, 0)
    tl.store(means + row * channels + channel, mean, mask=known)
    tl.store(variances + row * channels + channel, second / divisor, mask=known)
    tl.store(counts + row + channel * 0, count, mask=channel == 0)


def stats_of(x: Tensor, mask: Tensor | None, cut: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (R, C) and count (R,) of a dense tensor, float64."""
    mean = x.new_empty((cut.rows, cut.channels), dtype=torch.float64)
    var, count = torch.empty_like(mean), mean.new_empty(cut.rows)
    if cut.parts == 1:
        run(_stats, cut.programs, x, mask, count, mean, var, *cut.sizes, PARTS=False, STAGES=stages(x), **cut.meta(x))
        return mean, var, count
    partial = mean.new_empty((3, cut.rows, cut.parts, cut.channels))
    run(_stats, cut.programs, x, mask, *partial, *cut.sizes, PARTS=True, STAGES=stages(x), **cut.meta(x))
    tiles = ceil_div(cut.channels, MERGE)
    run(
        _merge_stats, cut.rows * tiles, *partial, count, mean, var, cut.parts, cut.channels, tiles,
        BP=MERGE, BC=MERGE, num_warps=1,
    )  # fmt: skip
    return mean, var, count


def stats(input: Tensor, mask: Tensor | None, slice_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(input)
    return stats_of(x, as_bytes(mask), plan(x, slice_size, reduces=True))
