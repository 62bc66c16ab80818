"""backward_elemt: dx = weight·invstd·(dz − Σdz/n − (x − mean)·invstd²·Σdz·(x − mean)/n), and dz for the residual."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .apply import activation_constants
from .coefficients import coefficients
from .launch import SIZE_ARGUMENTS, as_bytes, contiguous_vectors, make_plan, run, same_layout
from .tile import (
    bounds_mask,
    coefficient,
    exclude_padding,
    locate,
    recompute_dz,
    row_offsets,
    store_gradients,
    valid_elements,
)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def _backward_elemt(
    grad_output, input, coefficients, residual, mask, grad_input, grad_residual,
    rows, channels, pixel_vectors, map_vectors, magic, bits, slice_rows, chunks, tiles, channel_blocks,
    BATCH_STATISTICS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BATCH_STATISTICS: the moments depend on x, so the gradient goes through them."""
    slice_index, _chunk, channel, channel_mask, first_row, end_row, tiles = locate(
        rows, channels, slice_rows, chunks, tiles, channel_blocks, NHWC, ROWS, WIDTH
    )
    high = coefficient(coefficients, 0, slice_index, channels, channel, channel_mask)
    scale = coefficient(coefficients, 1, slice_index, channels, channel, channel_mask)
    shift = coefficient(coefficients, 2, slice_index, channels, channel, channel_mask)
    grad_shift = None
    grad_scale = None
    if BATCH_STATISTICS:
        grad_shift = coefficient(coefficients, 3, slice_index, channels, channel, channel_mask)
        grad_scale = coefficient(coefficients, 4, slice_index, channels, channel, channel_mask)
    for tile in tl.range(tiles, num_stages=STAGES):
        n = first_row + tile * ROWS + tl.arange(0, ROWS)
        offsets = row_offsets(n, channel, pixel_vectors, map_vectors, magic, bits, NHWC, VECTOR, LARGE)
        in_bounds = bounds_mask(n, end_row, channel_mask, NHWC, FULL)
        d, dz = recompute_dz(
            grad_output, input, residual, offsets, in_bounds, high, scale, shift, ACTIVATION, SLOPE, COMPUTE
        )
        valid = in_bounds
        invalid = None
        if mask is not None:
            valid = valid_elements(mask, n, end_row, in_bounds, NHWC, WIDTH)
            d, dz, invalid = exclude_padding(d, dz, valid)
        store_gradients(
            grad_input, grad_residual, offsets, in_bounds, d, dz, valid, invalid, scale, grad_shift, grad_scale
        )


def launch_backward_elemt(
    grad_output: Tensor,
    x: Tensor,
    coefs: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    batch_statistics: bool,
    outputs: tuple[Tensor | None, Tensor | None],
    constants: dict[str, Any],
    slice_size: int,
) -> None:
    """Compute dx and dz from the coefficients, and write them to `outputs`, (grad_input, grad_residual).

    All tensors are dense and have the layout of x.
    """
    plan = make_plan(x, slice_size, launch.ELEMENT)
    meta = {"STAGES": 1, "BATCH_STATISTICS": batch_statistics} | plan.meta(mask) | constants
    run(_backward_elemt, plan.programs, grad_output, x, coefs, residual, mask, *outputs, *plan.sizes, **meta)


def backward_elemt(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    sum_dy: Tensor | None,
    sum_dy_xmu: Tensor | None,
    count: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    x = dense(input)
    grad, dense_residual = same_layout(grad_output, x), same_layout(residual, x)
    assert grad is not None
    grad_input, grad_residual = torch.empty_like(x), torch.empty_like(x) if need_residual else None
    vectors = contiguous_vectors(mean, var, weight, bias, sum_dy, sum_dy_xmu, count)
    coefs = coefficients(x, vectors[:4], (vectors[4], vectors[5]), vectors[6], eps)
    outputs, constants = (grad_input, grad_residual), activation_constants(activation, negative_slope)
    launch_backward_elemt(
        grad, x, coefs, dense_residual, as_bytes(mask), count is not None, outputs, constants, slice_size
    )
    return grad_input, input.new_empty(0) if grad_residual is None else grad_residual
