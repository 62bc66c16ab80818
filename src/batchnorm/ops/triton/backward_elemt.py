"""backward_elemt: dx = weight·invstd·(dz − Σdz/n − (x − mean)·invstd²·Σdz·(x − mean)/n), and dz for the residual."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from .apply import form
from .launch import as_bytes, plan, run, same_layout, stages, vectors
from .tile import given, incoming, locate, place, scales, shifts, slope_terms, split, store_gradients


@triton.jit
def _backward_elemt(
    grad_output, input, mean, var, weight, bias, residual, mask, sum_dy, sum_dy_xmu, count, grad_input, grad_residual,
    samples, channels, positions, stride, per_slice, strips, chunks, inner_tiles,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row, _part, channel, known, inner, live, base, first, last = locate(
        samples, channels, positions, per_slice, strips, chunks, inner_tiles, LAST, BN, BI
    )
    mu, sigma2 = given(mean, var, row, channels, channel, known)
    high, low = split(mu, COMPUTE)
    invstd, scale = scales(sigma2, weight, channel, known, EPS)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    along = None
    across = None
    if count is not None:
        along, across = given(sum_dy, sum_dy_xmu, row, channels, channel, known)
        along, across = slope_terms(along, across, invstd, low, tl.load(count + row).to(tl.float64), COMPUTE)
    for chunk in tl.range(chunks, num_stages=STAGES):
        n = first + chunk * BN + tl.arange(0, BN)
        at, exists = place(n, last, inner, live, base, stride)
        d, grad, real, empty = incoming(
            grad_output, input, residual, mask, at, exists, n, last, inner, positions, high, scale, shift,
            ACTIVATION, SLOPE, COMPUTE, LAST,
        )  # fmt: skip
        store_gradients(
            grad_input, grad_residual, at, exists, d, grad, real, empty, scale, along, across, mask is not None
        )


def elemt(
    grad_output: Tensor,
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    sums: tuple[Tensor | None, Tensor | None],
    count: Tensor | None,
    outputs: tuple[Tensor | None, Tensor | None],
    compiled: dict[str, Any],
    slice_size: int,
) -> None:
    """Fill the (grad_input, grad_residual) that are there. All arguments dense, in x's memory order."""
    cut = plan(x, slice_size, reduces=False)
    arguments = (grad_output, x, *small, residual, mask, *sums, count, *outputs)
    run(_backward_elemt, cut.programs, *arguments, *cut.sizes, STAGES=stages(x), **cut.meta(x), **compiled)


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
    elemt(
        grad, x, small[:4], added, as_bytes(mask), (small[4], small[5]), small[6], (grad_input, grad_residual),
        form(eps, activation, negative_slope), slice_size,
    )  # fmt: skip
    return grad_input, input.new_empty(0) if grad_residual is None else grad_residual
