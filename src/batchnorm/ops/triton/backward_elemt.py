"""backward_elemt: dx = weight·invstd·(dz − Σdz/n − (x − mean)·invstd²·Σdz·(x − mean)/n), and dz for the residual."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from . import launch
from .apply import form
from .coefficients import coefficients
from .launch import SIZES, as_bytes, plan, run, same_layout, vectors
from .tile import coefficient, holes, incoming, inside, locate, place, real_positions, store_gradients


@triton.jit(do_not_specialize=SIZES)
def _backward_elemt(
    grad_output, input, coefficients, residual, mask, grad_input, grad_residual,
    samples, channels, units, vectors, magic, bits, per_slice, strips, chunks, tiles,
    THROUGH: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """THROUGH: the gradient passes through the moments, which are the batch's own."""
    row, _strip, channel, known, first, last, chunks = locate(
        samples, channels, per_slice, strips, chunks, tiles, LAST, BN, BI
    )
    high = coefficient(coefficients, 0, row, channels, channel, known)
    scale = coefficient(coefficients, 1, row, channels, channel, known)
    shift = coefficient(coefficients, 2, row, channels, channel, known)
    along = None
    across = None
    if THROUGH:
        along = coefficient(coefficients, 3, row, channels, channel, known)
        across = coefficient(coefficients, 4, row, channels, channel, known)
    for chunk in tl.range(chunks, num_stages=STAGES):
        n = first + chunk * BN + tl.arange(0, BN)
        at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
        exists = inside(n, last, known, LAST, EVEN)
        d, grad = incoming(grad_output, input, residual, at, exists, high, scale, shift, ACTIVATION, SLOPE, COMPUTE)
        real = exists
        empty = None
        if mask is not None:
            real = real_positions(mask, n, last, exists, LAST, BI)
            empty = holes(d, real)
            grad = tl.where(empty, 0.0, grad)
            d = tl.where(empty, 0.0, d)
        store_gradients(grad_input, grad_residual, at, exists, d, grad, real, empty, scale, along, across)


def elemt(
    grad_output: Tensor,
    x: Tensor,
    found: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    through: bool,
    outputs: tuple[Tensor | None, Tensor | None],
    compiled: dict[str, Any],
    slice_size: int,
) -> None:
    """Fill the (grad_input, grad_residual) that are there, given the coefficients, with the sums' if `through`.

    All arguments dense, in x's memory order.
    """
    cut = plan(x, slice_size, launch.ELEMENT)
    meta = {"STAGES": 1, "THROUGH": through} | cut.meta(mask) | compiled
    run(_backward_elemt, cut.programs, grad_output, x, found, residual, mask, *outputs, *cut.sizes, **meta)


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
    grad, added = same_layout(grad_output, x), same_layout(residual, x)
    assert grad is not None
    grad_input, grad_residual = torch.empty_like(x), torch.empty_like(x) if need_residual else None
    small = vectors(mean, var, weight, bias, sum_dy, sum_dy_xmu, count)
    found = coefficients(x, small[:4], (small[4], small[5]), small[6], eps)
    outputs, compiled = (grad_input, grad_residual), form(activation, negative_slope)
    elemt(grad, x, found, added, as_bytes(mask), count is not None, outputs, compiled, slice_size)
    return grad_input, input.new_empty(0) if grad_residual is None else grad_residual
