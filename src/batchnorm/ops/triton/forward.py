"""forward: `stats`, then `apply`. One launch reads x once where a tile has all values of a channel in a slice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .activations import activate
from .apply import activation_constants, launch_apply
from .launch import SIZE_ARGUMENTS, TilePlan, as_bytes, contiguous_vectors, make_plan, run, same_layout
from .stats import launch_stats
from .tile import (
    affine,
    bounds_mask,
    count_valid,
    invstd_and_scale,
    locate,
    read,
    row_offsets,
    shift_of,
    split_mean,
    tile_moments,
    valid_elements,
    write,
)
from .update_running_ import RunningBuffers, split_float, update_buffers, update_running_


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def _forward(
    input, weight, bias, residual, mask, out, counts, means, variances,
    running_mean, running_var, num_batches_tracked, momentum, momentum_low,
    rows, channels, pixel_vectors, map_vectors, magic, bits, slice_rows, chunks, tiles, channel_blocks,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slice_index, _, channel, channel_mask, first_row, end_row, _ = locate(
        rows, channels, slice_rows, chunks, tiles, channel_blocks, NHWC, ROWS, WIDTH
    )
    n = first_row + tl.arange(0, ROWS)
    offsets = row_offsets(n, channel, pixel_vectors, map_vectors, magic, bits, NHWC, VECTOR, LARGE)
    in_bounds = bounds_mask(n, end_row, channel_mask, NHWC, FULL)
    x = read(input, offsets, in_bounds, COMPUTE)
    valid = valid_elements(mask, n, end_row, in_bounds, NHWC, WIDTH)
    count = count_valid(mask, n, end_row, valid, NHWC, WIDTH)
    mean, m2 = tile_moments(x, valid, count, NHWC, ROWS, WIDTH)
    var = m2 / tl.maximum(count, 1.0)
    target = slice_index * channels + channel
    tl.store(counts + slice_index + channel * 0, count, mask=channel == 0)
    tl.store(means + target, mean, mask=channel_mask)
    tl.store(variances + target, var, mask=channel_mask)
    if running_mean is not None or running_var is not None or num_batches_tracked is not None:
        update_buffers(
            running_mean, running_var, num_batches_tracked, mean, var, count, momentum, momentum_low,
            channel, channel_mask,
        )  # fmt: skip
    high, low = split_mean(mean, COMPUTE)
    _invstd, scale = invstd_and_scale(var, weight, channel, channel_mask, EPS)
    shift = shift_of(bias, low, scale, channel, channel_mask, COMPUTE)
    scale = scale.to(COMPUTE)
    _d, z = affine(x, high, scale, shift, residual, offsets, in_bounds)
    y = activate(z, ACTIVATION, SLOPE)
    write(out, offsets, y, in_bounds)


def _launch_fused(
    x: Tensor,
    vectors: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    constants: dict[str, object],
    plan: TilePlan,
    buffers: RunningBuffers,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty((plan.slices, plan.channels), dtype=torch.float64)
    out, var, count = torch.empty_like(x), torch.empty_like(mean), mean.new_empty(plan.slices)
    arguments = (x, *vectors, residual, mask, out, count, mean, var, *buffers, *split_float(momentum))
    run(_forward, plan.programs, *arguments, *plan.sizes, **plan.meta(mask), **constants)
    return out, mean, var, count


def _forward_updating(
    input: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    form: tuple[float, str, float, int],
    buffers: RunningBuffers = (None, None, None),
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `forward`, and update the buffers that are given in its last launch, which needs a single slice."""
    eps, activation, negative_slope, slice_size = form
    x = dense(input)
    vectors, dense_residual = contiguous_vectors(*affine), same_layout(residual, x)
    mask_bytes, plan = as_bytes(mask), make_plan(x, slice_size, launch.STATS)
    if plan.fused:
        constants = {"EPS": eps, **activation_constants(activation, negative_slope)}
        return _launch_fused(x, vectors, dense_residual, mask_bytes, constants, plan, buffers, momentum)
    mean, var, count, coefs = launch_stats(x, mask_bytes, plan, (vectors[0], vectors[1]), eps, buffers, momentum)
    assert coefs is not None
    return launch_apply(x, coefs, dense_residual, activation, negative_slope, slice_size), mean, var, count


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
    return _forward_updating(input, (weight, bias), residual, mask, (eps, activation, negative_slope, slice_size))


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
    form = (eps, activation, negative_slope, slice_size)
    # `forward` updates a channel without the others. Pooling slices, skipping a batch and averaging batches need all.
    independent = momentum is not None and not skip_nonfinite and not 0 < slice_size < input.size(0)
    if independent and all(t is None or t.is_contiguous() for t in buffers):
        return _forward_updating(input, (weight, bias), residual, mask, form, buffers, momentum or 0.0)
    out, mean, var, count = _forward_updating(input, (weight, bias), residual, mask, form)
    update_running_(*buffers, mean, var, count, momentum, skip_nonfinite)
    return out, mean, var, count
