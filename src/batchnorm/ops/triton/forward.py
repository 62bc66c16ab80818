"""forward = stats, then apply; one launch that reads the input once where a channel of a slice fits one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .activations import activate
from .apply import applied, form
from .launch import SIZES, Plan, as_bytes, plan, run, same_layout, vectors
from .stats import stats_of
from .tile import (
    argument,
    counted,
    inside,
    locate,
    moments,
    place,
    read,
    real_positions,
    scales,
    shifts,
    split,
    write,
)
from .update_running_ import Buffers, move, parts, update_running_


@triton.jit(do_not_specialize=SIZES)
def _forward(
    input, weight, bias, residual, mask, out, counts, means, variances,
    running_mean, running_var, num_batches_tracked, momentum, rest,
    samples, channels, units, vectors, magic, bits, per_slice, strips, chunks, tiles,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    row, _, channel, known, first, last, _ = locate(samples, channels, per_slice, strips, chunks, tiles, LAST, BN, BI)
    n = first + tl.arange(0, BN)
    at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
    exists = inside(n, last, known, LAST, EVEN)
    x = read(input, at, exists, COMPUTE)
    real = real_positions(mask, n, last, exists, LAST, BI)
    count = counted(mask, n, last, real, LAST, BI)
    mean, second = moments(x, real, count, LAST, BN, BI)
    var = second / tl.maximum(count, 1.0)
    to = row * channels + channel
    tl.store(counts + row + channel * 0, count, mask=channel == 0)
    tl.store(means + to, mean, mask=known)
    tl.store(variances + to, var, mask=known)
    if running_mean is not None or running_var is not None or num_batches_tracked is not None:
        move(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, rest, channel, known)
    high, low = split(mean, COMPUTE)
    _invstd, scale = scales(var, weight, channel, known, EPS)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    _d, z = argument(x, high, scale, shift, residual, at, exists)
    y = activate(z, ACTIVATION, SLOPE)
    write(out, at, y, exists)


def _one_launch(
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    compiled: dict[str, object],
    cut: Plan,
    buffers: Buffers,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty((cut.rows, cut.channels), dtype=torch.float64)
    out, var, count = torch.empty_like(x), torch.empty_like(mean), mean.new_empty(cut.rows)
    arguments = (x, *small, residual, mask, out, count, mean, var, *buffers, *parts(momentum))
    run(_forward, cut.programs, *arguments, *cut.sizes, **cut.meta(mask), **compiled)
    return out, mean, var, count


def _forward_moving(
    input: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    form_: tuple[float, str, float, int],
    buffers: Buffers = (None, None, None),
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`, in whose launches the buffers that are given move; for one slice."""
    eps, activation, negative_slope, slice_size = form_
    x = dense(input)
    small, added, bytes_, cut = (
        vectors(*affine),
        same_layout(residual, x),
        as_bytes(mask),
        plan(x, slice_size, launch.STATS),
    )
    if cut.fused:
        compiled = {"EPS": eps, **form(activation, negative_slope)}
        return _one_launch(x, small, added, bytes_, compiled, cut, buffers, momentum)
    mean, var, count, found = stats_of(x, bytes_, cut, (small[0], small[1]), eps, buffers, momentum)
    assert found is not None
    return applied(x, found, added, activation, negative_slope, slice_size), mean, var, count


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_moving(input, (weight, bias), residual, mask, (eps, activation, negative_slope, slice_size))


def forward_update_running_(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    buffers = (running_mean, running_var, num_batches_tracked)
    form_ = (eps, activation, negative_slope, slice_size)
    # what one channel cannot decide takes a launch of its own: slices to pool, a batch to skip, batches to average
    alone = momentum is not None and not skip_nonfinite and not 0 < slice_size < input.size(0)
    if alone and all(t is None or t.is_contiguous() for t in buffers):
        return _forward_moving(input, (weight, bias), residual, mask, form_, buffers, momentum or 0.0)
    out, mean, var, count = _forward_moving(input, (weight, bias), residual, mask, form_)
    update_running_(*buffers, mean, var, count, momentum, skip_nonfinite)
    return out, mean, var, count
