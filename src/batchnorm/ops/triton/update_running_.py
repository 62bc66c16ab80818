"""update_running_: the buffers moved by a batch's moments, in one launch or in the one that found them.

Tensor operations on vectors of C values would be two dozen launches.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .. import fused
from .launch import power_of_2, run, vectors
from .tile import rounded

BLOCK = 1024  # channels at a time


@triton.jit
def _pooled(mean, var, count, rows, channels, channel, known, BLOCK: tl.constexpr):
    """One row from R as fused.pooled: Σnμ/Σn, Σnσ²/Σ(n−1), and Σ(n−1)."""
    total = tl.full((), 0.0, tl.float64)
    freedom = tl.full((), 0.0, tl.float64)
    along = tl.zeros((BLOCK,), tl.float64)
    across = tl.zeros((BLOCK,), tl.float64)
    for r in range(rows):
        at = tl.cast(r, tl.int64) * channels + channel
        n = tl.load(count + r)
        total += n
        freedom += tl.maximum(n - 1, 0.0)
        along += n * tl.load(mean + at, mask=known, other=0.0)
        across += n * tl.load(var + at, mask=known, other=0.0)
    return along / tl.maximum(total, 1.0), across / tl.maximum(freedom, 1.0), freedom


@triton.jit
def _finite(value, buffer):
    """1 where the value is finite, and still is in the buffer's dtype."""
    if buffer is not None:
        value = rounded(value, buffer.dtype.element_ty).to(tl.float64)
    return (tl.abs(value) < float("inf")).to(tl.int32)


@triton.jit
def move(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, rest, channel, known):
    """The buffers of these channels by the one row of moments that the calling kernel has just found."""
    if num_batches_tracked is not None:
        first = tl.program_id(0) == 0
        tl.store(num_batches_tracked, tl.load(num_batches_tracked, mask=first) + 1, mask=first)
    # Triton passes a Python float as float32: 0.1 comes in two parts
    factor = tl.cast(momentum, tl.float64) + tl.cast(rest, tl.float64)
    freedom = tl.maximum(count - 1, 0.0)
    _moved(running_mean, mean, freedom == 0, factor, channel, known)
    _moved(running_var, var * (count / tl.maximum(freedom, 1.0)), freedom == 0, factor, channel, known)


@triton.jit
def _moved(buffer, new, keep, factor, channel, known):
    if buffer is not None:
        old = tl.load(buffer + channel, mask=known, other=0.0).to(tl.float64)
        value = tl.where(keep, old, old + factor * (new - old))
        tl.store(buffer + channel, rounded(value, buffer.dtype.element_ty), mask=known)


@triton.jit
def _update_running_(
    mean, var, count, running_mean, running_var, num_batches_tracked, momentum, rest, rows, channels,
    CUMULATIVE: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.cast(momentum, tl.float64) + tl.cast(rest, tl.float64)
    if num_batches_tracked is not None:
        batches = tl.load(num_batches_tracked) + 1
        tl.store(num_batches_tracked, batches)
        if CUMULATIVE:
            factor = 1.0 / batches.to(tl.float64)
    finite = tl.full((), 1, tl.int32)
    if SKIP:
        for start in range(0, channels, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            new_mean, new_var, _freedom = _pooled(mean, var, count, rows, channels, channel, channel < channels, BLOCK)
            both = _finite(new_mean, running_mean) & _finite(new_var, running_mean)
            finite = finite & tl.min(both, 0)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        known = channel < channels
        new_mean, new_var, freedom = _pooled(mean, var, count, rows, channels, channel, known, BLOCK)
        keep = (freedom == 0) | (finite == 0)
        _moved(running_mean, new_mean, keep, factor, channel, known)
        _moved(running_var, new_var, keep, factor, channel, known)


@lru_cache(maxsize=64)
def parts(momentum: float) -> tuple[float, float]:
    """A number as its float32 and what that leaves."""
    high = struct.unpack("f", struct.pack("f", momentum))[0]
    return high, momentum - high


Buffers = tuple[Tensor | None, Tensor | None, Tensor | None]


def update_running_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    buffers = (running_mean, running_var, num_batches_tracked)
    odd = any(t is not None and not t.is_contiguous() for t in buffers)
    if odd or (momentum is None and num_batches_tracked is None):  # whose refusal is the reference's
        return fused.update_running_(*buffers, mean, var, count, momentum, skip_nonfinite)
    channels = mean.size(-1)
    rows = mean.numel() // channels
    sizes, block = (*parts(momentum or 0.0), rows, channels), min(BLOCK, power_of_2(channels))
    run(
        _update_running_, 1, *vectors(mean, var, count), *buffers, *sizes,
        CUMULATIVE=momentum is None, SKIP=skip_nonfinite, BLOCK=block, num_warps=max(1, min(8, block // 64)),
    )  # fmt: skip
    return None
