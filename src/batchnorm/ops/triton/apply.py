"""apply: y = activation((x − mean)·invstd·weight + bias + residual), with one read of x and residual and one write."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .activations import activate
from .coefficients import coefficients
from .launch import SIZE_ARGUMENTS, contiguous_vectors, make_plan, run, same_layout
from .tile import affine, bounds_mask, coefficient, locate, read, row_offsets, write


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def _apply(
    input, coefficients, residual, out,
    rows, channels, pixel_vectors, map_vectors, magic, bits, slice_rows, chunks, tiles, channel_blocks,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    slice_index, _chunk, channel, channel_mask, first_row, end_row, tiles = locate(
        rows, channels, slice_rows, chunks, tiles, channel_blocks, NHWC, ROWS, WIDTH
    )
    high = coefficient(coefficients, 0, slice_index, channels, channel, channel_mask)
    scale = coefficient(coefficients, 1, slice_index, channels, channel, channel_mask)
    shift = coefficient(coefficients, 2, slice_index, channels, channel, channel_mask)
    for tile in tl.range(tiles, num_stages=STAGES):
        n = first_row + tile * ROWS + tl.arange(0, ROWS)
        offsets = row_offsets(n, channel, pixel_vectors, map_vectors, magic, bits, NHWC, VECTOR, LARGE)
        in_bounds = bounds_mask(n, end_row, channel_mask, NHWC, FULL)
        x = read(input, offsets, in_bounds, COMPUTE)
        _d, z = affine(x, high, scale, shift, residual, offsets, in_bounds)
        y = activate(z, ACTIVATION, SLOPE)
        write(out, offsets, y, in_bounds)


def activation_constants(activation: str, negative_slope: float) -> dict[str, Any]:
    """Return the compile-time constants of an activation. An unused slope is 0, so that it compiles no other kernel."""
    return {"ACTIVATION": activation, "SLOPE": negative_slope if activation == "leaky_relu" else 0.0}


def launch_apply(
    x: Tensor, coefs: Tensor, residual: Tensor | None, activation: str, negative_slope: float, slice_size: int
) -> Tensor:
    """Compute the output from the coefficients. x is dense, and the residual has its layout."""
    out, plan = torch.empty_like(x), make_plan(x, slice_size, launch.APPLY)
    meta = {"STAGES": 1} | plan.meta() | activation_constants(activation, negative_slope)
    run(_apply, plan.programs, x, coefs, residual, out, *plan.sizes, **meta)
    return out


def apply(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
) -> Tensor:
    x = dense(input)
    coefs = coefficients(x, contiguous_vectors(mean, var, weight, bias), (None, None), None, eps)
    return launch_apply(x, coefs, same_layout(residual, x), activation, negative_slope, slice_size)
