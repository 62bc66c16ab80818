"""update_running_: update the buffers by a batch's moments, in one launch, or in the launch that computes the moments.

PyTorch's operators would need two dozen launches for it.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .. import fused
from .launch import contiguous_vectors, power_of_2, run
from .tile import rounded

BLOCK = 1024  # channels that a program updates at a time


@triton.jit
def _pooled_moments(mean, var, count, slices, channels, channel, channel_mask, BLOCK: tl.constexpr):
    """Compute Σnμ/Σn, Σnσ²/Σ(n−1) and Σ(n−1) over R slices, as fused.pooled does."""
    total = tl.full((), 0.0, tl.float64)
    freedom = tl.full((), 0.0, tl.float64)
    mean_sum = tl.zeros((BLOCK,), tl.float64)
    var_sum = tl.zeros((BLOCK,), tl.float64)
    for r in range(slices):
        offsets = tl.cast(r, tl.int64) * channels + channel
        n = tl.load(count + r)
        total += n
        freedom += tl.maximum(n - 1, 0.0)
        mean_sum += n * tl.load(mean + offsets, mask=channel_mask, other=0.0)
        var_sum += n * tl.load(var + offsets, mask=channel_mask, other=0.0)
    return mean_sum / tl.maximum(total, 1.0), var_sum / tl.maximum(freedom, 1.0), freedom


@triton.jit
def _finite(value, buffer):
    """Return 1 where the value is finite, also in the buffer's dtype."""
    if buffer is not None:
        value = rounded(value, buffer.dtype.element_ty).to(tl.float64)
    return (tl.abs(value) < float("inf")).to(tl.int32)


@triton.jit
def update_buffers(
    running_mean, running_var, num_batches_tracked, mean, var, count, momentum, momentum_low, channel, channel_mask
):
    """Update the buffers of these channels by the moments of a single slice."""
    if num_batches_tracked is not None:
        is_first = tl.program_id(0) == 0
        tl.store(num_batches_tracked, tl.load(num_batches_tracked, mask=is_first) + 1, mask=is_first)
    # Triton passes a Python float as float32, so the momentum is two arguments
    factor = tl.cast(momentum, tl.float64) + tl.cast(momentum_low, tl.float64)
    freedom = tl.maximum(count - 1, 0.0)
    _update_buffer(running_mean, mean, freedom == 0, factor, channel, channel_mask)
    _update_buffer(running_var, var * (count / tl.maximum(freedom, 1.0)), freedom == 0, factor, channel, channel_mask)


@triton.jit
def _update_buffer(buffer, new, keep, factor, channel, channel_mask):
    if buffer is not None:
        old = tl.load(buffer + channel, mask=channel_mask, other=0.0).to(tl.float64)
        value = tl.where(keep, old, (1 - factor) * old + factor * new)
        tl.store(buffer + channel, rounded(value, buffer.dtype.element_ty), mask=channel_mask)


@triton.jit
def _update_running_(
    mean, var, count, running_mean, running_var, num_batches_tracked, momentum, momentum_low, slices, channels,
    CUMULATIVE: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    factor = tl.cast(momentum, tl.float64) + tl.cast(momentum_low, tl.float64)
    if num_batches_tracked is not None:
        batches = tl.load(num_batches_tracked) + 1
        tl.store(num_batches_tracked, batches)
        if CUMULATIVE:
            factor = 1.0 / batches.to(tl.float64)
    finite = tl.full((), 1, tl.int32)
    if SKIP:
        for start in range(0, channels, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            new_mean, new_var, _freedom = _pooled_moments(
                mean, var, count, slices, channels, channel, channel < channels, BLOCK
            )
            both = _finite(new_mean, running_mean) & _finite(new_var, running_mean)
            finite = finite & tl.min(both, 0)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        channel_mask = channel < channels
        new_mean, new_var, freedom = _pooled_moments(mean, var, count, slices, channels, channel, channel_mask, BLOCK)
        keep = (freedom == 0) | (finite == 0)
        _update_buffer(running_mean, new_mean, keep, factor, channel, channel_mask)
        _update_buffer(running_var, new_var, keep, factor, channel, channel_mask)


@lru_cache(maxsize=64)
def split_float(momentum: float) -> tuple[float, float]:
    """Split a number into its float32 and the difference."""
    high = struct.unpack("f", struct.pack("f", momentum))[0]
    return high, momentum - high


RunningBuffers = tuple[Tensor | None, Tensor | None, Tensor | None]


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
    strided = any(t is not None and not t.is_contiguous() for t in buffers)
    # a counter may live elsewhere (a checkpoint with assign=True) or be complex: torch's operators take it
    odd_counter = num_batches_tracked is not None and (
        num_batches_tracked.device != mean.device or num_batches_tracked.is_complex()
    )
    uncounted = momentum is None and num_batches_tracked is None  # the reference raises its error
    if strided or odd_counter or uncounted:
        return fused.update_running_(*buffers, mean, var, count, momentum, skip_nonfinite)
    channels = mean.size(-1)
    slices = mean.numel() // channels
    sizes, block = (*split_float(momentum or 0.0), slices, channels), min(BLOCK, power_of_2(channels))
    run(
        _update_running_, 1, *contiguous_vectors(mean, var, count), *buffers, *sizes,
        CUMULATIVE=momentum is None, SKIP=skip_nonfinite, BLOCK=block, num_warps=max(1, min(8, block // 64)),
    )  # fmt: skip
    return None
