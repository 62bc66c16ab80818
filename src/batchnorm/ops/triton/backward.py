"""backward: `backward_reduce`, then `backward_elemt`; one launch where a tile has all values of a channel and slice."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .apply import activation_constants
from .backward_elemt import launch_backward_elemt
from .backward_reduce import launch_backward_reduce, merge_sums
from .coefficients import coefficients, empty_coefficients
from .launch import SIZE_ARGUMENTS, TilePlan, as_bytes, contiguous_vectors, make_plan, run, same_layout
from .tile import (
    bounds_mask,
    exclude_padding,
    grad_coefficients,
    locate,
    recompute_dz,
    reduce_coefficients,
    rounded,
    row_offsets,
    store_gradients,
    sum_terms,
    tile_sum,
    valid_elements,
)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def _backward(
    grad_output, input, mean, var, weight, bias, residual, mask, count,
    grad_input, grad_residual, grad_weight, grad_bias, sums, sums_xmu,
    rows, channels, pixel_vectors, map_vectors, magic, bits, slice_rows, chunks, tiles, channel_blocks,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, NHWC: tl.constexpr, VECTOR: tl.constexpr, LARGE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slice_index, _chunk, channel, channel_mask, first_row, end_row, _ = locate(
        rows, channels, slice_rows, chunks, tiles, channel_blocks, NHWC, ROWS, WIDTH
    )
    high, low, scale, shift, invstd, rounded_invstd, xhat_shift = reduce_coefficients(
        mean, var, weight, bias, slice_index, channels, channel, channel_mask, EPS, COMPUTE
    )
    n = first_row + tl.arange(0, ROWS)
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
    dz_term, dz_xhat_term = sum_terms(d, dz, in_bounds, rounded_invstd, xhat_shift)
    sum_dy = tile_sum(dz_term, NHWC).to(tl.float64)
    sum_dy_xmu = tile_sum(dz_xhat_term, NHWC).to(tl.float64) / rounded_invstd.to(tl.float64)
    if sums is not None:  # with several slices, another launch adds their sums
        tl.store(sums + slice_index * channels + channel, sum_dy, mask=channel_mask)
        tl.store(sums_xmu + slice_index * channels + channel, sum_dy_xmu, mask=channel_mask)
    if grad_weight is not None:
        tl.store(grad_weight + channel, rounded(sum_dy_xmu * invstd, grad_weight.dtype.element_ty), mask=channel_mask)
    if grad_bias is not None:
        tl.store(grad_bias + channel, rounded(sum_dy, grad_bias.dtype.element_ty), mask=channel_mask)
    grad_shift = None
    grad_scale = None
    if count is not None:
        values = tl.load(count + slice_index).to(tl.float64)
        grad_shift, grad_scale = grad_coefficients(sum_dy, sum_dy_xmu, invstd, low, values, COMPUTE)
    store_gradients(grad_input, grad_residual, offsets, in_bounds, d, dz, valid, invalid, scale, grad_shift, grad_scale)


class BackwardCall(NamedTuple):
    """What both ways of launching need. All tensors are dense and have the layout of x."""

    grad_output: Tensor
    x: Tensor
    vectors: list[Tensor | None]  # mean, var, weight, bias
    value_count: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    grads: list[Tensor | None]  # where the gradients of input, weight, bias and residual are written, if wanted
    constants: dict[str, Any]
    eps: float
    slice_size: int
    plan: TilePlan


def _launch_fused(call: BackwardCall) -> None:
    """Compute the gradients in one launch."""
    grad_input, grad_weight, grad_bias, grad_residual = call.grads
    plan, sums = call.plan, None
    affine = (grad_weight, grad_bias)
    if plan.slices > 1 and (grad_weight is not None or grad_bias is not None):
        partial = call.x.new_empty((2, plan.slices, 1, plan.channels), dtype=torch.float64)
        sums, affine = (partial[0], partial[1]), (None, None)
    run(
        _backward, plan.programs, call.grad_output, call.x, *call.vectors, call.residual, call.mask, call.value_count,
        grad_input, grad_residual, *affine, *(sums or (None, None)), *plan.sizes,
        EPS=call.eps, **plan.meta(call.mask), **call.constants,
    )  # fmt: skip
    if sums is not None:
        merge_sums(sums, [*call.vectors, call.value_count], (None, None), (grad_weight, grad_bias), None, call.eps)


# Activations with the derivative 0 or 1: dz = grad_output·derivative is not rounded
UNIT_DERIVATIVE = ("relu", "relu6")


def _launch_passes(call: BackwardCall) -> None:
    """Compute the gradients in two passes: one for the sums, where they are needed, and one for dx."""
    grad_output, x, vectors, count, residual, mask, grads, constants, eps, slice_size, plan = call
    grad_input, grad_weight, grad_bias, grad_residual = grads
    batch_statistics = grad_input is not None and count is not None
    coefs = None
    if grad_weight is not None or grad_bias is not None or batch_statistics:
        dz = grad_residual if constants["ACTIVATION"] in UNIT_DERIVATIVE else None
        partial = launch_backward_reduce(grad_output, x, vectors, residual, mask, constants, plan, eps, dz)
        coefs = empty_coefficients(x, plan.slices) if batch_statistics else None
        merge_sums(partial, [*vectors, count], (None, None), (grad_weight, grad_bias), coefs, eps)
        if dz is not None:  # then the second pass reads dz instead of grad_output and the residual
            grad_output, residual, grad_residual, constants = dz, None, None, activation_constants("", 0.0)
    if grad_input is not None or grad_residual is not None:
        if coefs is None:
            coefs = coefficients(x, vectors, (None, None), None, eps)
        outputs = (grad_input, grad_residual)
        launch_backward_elemt(grad_output, x, coefs, residual, mask, batch_statistics, outputs, constants, slice_size)


def backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(input)
    grad, dense_residual = same_layout(grad_output, x), same_layout(residual, x)
    assert grad is not None
    grads = [
        torch.empty_like(t) if wanted and t is not None else None
        for t, wanted in zip((x, weight, bias, x), output_mask, strict=True)
    ]
    *vectors, dense_count = contiguous_vectors(mean, var, weight, bias, count)
    constants, plan = activation_constants(activation, negative_slope), make_plan(x, slice_size, launch.REDUCE)
    call = BackwardCall(
        grad, x, vectors, dense_count, dense_residual, as_bytes(mask), grads, constants, eps, slice_size, plan
    )
    if plan.fused:
        _launch_fused(call)
    else:
        _launch_passes(call)
    unwanted = input.new_empty(0)
    grad_input, grad_weight, grad_bias, grad_residual = (unwanted if t is None else t for t in grads)
    return grad_input, grad_weight, grad_bias, grad_residual
