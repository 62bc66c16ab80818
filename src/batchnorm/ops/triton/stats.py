"""stats: each program reduces a strip to (count, mean, M2); a second, tiny launch merges a channel's strips."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .coefficients import room
from .launch import SIZES, Plan, as_bytes, ceil_div, plan, power_of_2, run
from .tile import (
    counted,
    inside,
    locate,
    merged,
    moments,
    only,
    place,
    read,
    real_positions,
    rounded_mean,
    store_coefficients,
    total,
)
from .update_running_ import Buffers, move, parts

MERGE = 2048  # (part, channel) pairs that a merging program takes at a time
MERGE_CHANNELS = 4  # 32 bytes of float64: the least that memory gives


@triton.jit
def _near(
    input, mask, first, last, channel, known, units, vectors, magic, bits,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """A shift near each channel's mean: the mean of lines from all over the strip.

    Every one exists, twice in a short strip, and they are a power of two: equal values give just that value.
    """
    n = first + (tl.arange(0, BN) * (last - first)) // BN
    at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
    exists = inside(n, last, known, LAST, EVEN)
    real = real_positions(mask, n, last, exists, LAST, BI)
    x = only(real, read(input, at, exists, COMPUTE))
    lines = BN if LAST else BN * BI
    # divided before it is summed: the sum of a tile near float32's largest value must not overflow
    shift = total(x * (1.0 / lines), LAST)
    if mask is not None:
        shift = rounded_mean(shift, counted(mask, n, last, real, LAST, BI), lines, COMPUTE)
    return shift


@triton.jit
def _surely(
    input, mask, first, last, chunks, channel, known, units, vectors, magic, bits,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of a strip whatever it holds: a tile's by two passes over its registers, tiles by Chan's merge.

    The sums of a tile are scaled by a power of two, so no square overflows or vanishes; twice the work of one shift.
    """
    count = tl.full((), 0.0, tl.float64)
    mean = tl.zeros(channel.shape, tl.float64)
    second = tl.zeros(channel.shape, tl.float64)
    for chunk in range(chunks):
        n = first + chunk * BN + tl.arange(0, BN)
        at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
        exists = inside(n, last, known, LAST, EVEN)
        real = real_positions(mask, n, last, exists, LAST, BI)
        x = read(input, at, exists, COMPUTE)
        tile_count = counted(mask, n, last, real, LAST, BI)
        tile_mean, tile_second = moments(x, real, tile_count, LAST, BN, BI)
        count, mean, second = merged(count, mean, second, tile_count, tile_mean, tile_second)
    return mean, second


@triton.jit(do_not_specialize=SIZES)
def _stats(
    input, mask, counts, means, seconds,
    samples, channels, units, vectors, magic, bits, per_slice, strips, chunks, tiles,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, strip, channel, known, first, last, chunks = locate(
        samples, channels, per_slice, strips, chunks, tiles, LAST, BN, BI
    )
    shift = _near(
        input, mask, first, last, channel, known, units, vectors, magic, bits, COMPUTE, LAST, UNIT, WIDE, EVEN, BN, BI
    )  # fmt: skip
    count = tl.full((), 0.0, tl.float64)
    deviations = tl.zeros((BN, BI), COMPUTE)
    squares = tl.zeros((BN, BI), COMPUTE)
    for chunk in tl.range(chunks, num_stages=STAGES):
        # from the end: what wrote x wrote that last, and the next pass begins where this one ends
        n = first + (chunks - 1 - chunk) * BN + tl.arange(0, BN)
        at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
        exists = inside(n, last, known, LAST, EVEN)
        real = real_positions(mask, n, last, exists, LAST, BI)
        d = only(real, read(input, at, exists, COMPUTE) - shift[None, :])
        deviations += d
        squares += d * d
        if mask is not None:
            count += counted(mask, n, last, real, LAST, BI)
    if mask is None:
        count = ((last - first) * (1 if LAST else BI)).to(tl.float64)
    inverse = 1.0 / tl.maximum(count, 1.0)
    along = total(deviations, LAST).to(tl.float64)
    across = total(squares, LAST).to(tl.float64)
    mean = shift.to(tl.float64) + along * inverse
    second = across - along * along * inverse
    # Little canceled and nothing over- or underflowed, or there is nothing but one value; a NaN fails both.
    sure = (across <= 16 * second) & (across >= 1e-30 * count) & (across < float("inf"))
    sure = sure | ((across == 0) & (along == 0))
    if tl.min(sure.to(tl.int32), 0) == 0:
        mean, second = _surely(
            input, mask, first, last, chunks, channel, known, units, vectors, magic, bits,
            COMPUTE, LAST, UNIT, WIDE, EVEN, BN, BI,
        )  # fmt: skip
    to = (row * strips + strip) * channels + channel
    tl.store(counts + to, count, mask=known)
    tl.store(means + to, mean, mask=known)
    tl.store(seconds + to, second, mask=known)


@triton.jit(do_not_specialize=["parts", "channels", "channel_tiles"])
def _merge_stats(
    part_counts, part_means, part_seconds, counts, means, variances,
    weight, bias, coefficients, running_mean, running_var, num_batches_tracked, momentum, rest,
    parts, channels, channel_tiles,
    EPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // channel_tiles).to(tl.int64)
    channel = (tl.program_id(0) % channel_tiles) * BC + tl.arange(0, BC)
    known = channel < channels
    counted_ = tl.zeros((BP, BC), tl.float64)
    weighed = tl.zeros((BP, BC), tl.float64)
    for start in range(0, parts, BP):
        p = start + tl.arange(0, BP)
        at = (row * parts + p[:, None]) * channels + channel[None, :]
        exists = (p < parts)[:, None] & known[None, :]
        n = tl.load(part_counts + at, mask=exists, other=0.0)
        counted_ += n
        weighed += n * tl.load(part_means + at, mask=exists, other=0.0)
    count = tl.sum(counted_, 0)
    divisor = tl.maximum(count, 1.0)
    mean = tl.sum(weighed, 0) / divisor
    seconds = tl.zeros((BP, BC), tl.float64)
    for start in range(0, parts, BP):
        p = start + tl.arange(0, BP)
        at = (row * parts + p[:, None]) * channels + channel[None, :]
        exists = (p < parts)[:, None] & known[None, :]
        n = tl.load(part_counts + at, mask=exists, other=0.0)
        apart = tl.load(part_means + at, mask=exists, other=0.0) - mean[None, :]
        apart = tl.where(exists, apart, 0.0)
        seconds += tl.load(part_seconds + at, mask=exists, other=0.0) + n * apart * apart
    variance = tl.sum(seconds, 0) / divisor
    tl.store(means + row * channels + channel, mean, mask=known)
    tl.store(variances + row * channels + channel, variance, mask=known)
    tl.store(counts + row + channel * 0, count, mask=channel == 0)
    if coefficients is not None:
        store_coefficients(
            coefficients, row, channels, channel, known, mean, variance, weight, bias, None, None, None, EPS
        )  # fmt: skip
    if running_mean is not None or running_var is not None or num_batches_tracked is not None:
        move(running_mean, running_var, num_batches_tracked, mean, variance, count, momentum, rest, channel, known)


def merge_meta(parts: int) -> dict[str, int]:
    """How a merging program takes a channel's parts: all at once, where there are not thousands."""
    together = min(power_of_2(parts), MERGE // MERGE_CHANNELS)
    return {"BP": together, "BC": MERGE_CHANNELS, "num_warps": max(1, min(8, together * MERGE_CHANNELS // 128))}


def stats_of(
    x: Tensor,
    mask: Tensor | None,
    cut: Plan,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float | None = None,
    buffers: Buffers = (None, None, None),
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Mean and variance (R, C) and count (R,) of a dense tensor, float64; with an eps, the coefficients of `apply`.

    The buffers that are given move, which takes one slice.
    """
    partial = x.new_empty((3, cut.rows, cut.strips, cut.channels), dtype=torch.float64)
    run(_stats, cut.programs, x, mask, *partial, *cut.sizes, **{"STAGES": 1} | cut.meta(mask))
    mean = partial.new_empty((cut.rows, cut.channels))
    var, count, tiles = torch.empty_like(mean), mean.new_empty(cut.rows), ceil_div(cut.channels, MERGE_CHANNELS)
    found = None if eps is None else room(x, cut.rows)
    run(
        _merge_stats, cut.rows * tiles, *partial, count, mean, var, *affine, found, *buffers, *parts(momentum),
        cut.strips, cut.channels, tiles, EPS=eps or 0.0, **merge_meta(cut.strips),
    )  # fmt: skip
    return mean, var, count, found


def stats(input: Tensor, mask: Tensor | None, slice_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(input)
    return stats_of(x, as_bytes(mask), plan(x, slice_size, launch.STATS))[:3]
