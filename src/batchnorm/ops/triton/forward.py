"""forward = stats, then apply; one launch that reads the input once where a channel of a slice fits one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from .activations import activate
from .apply import apply, form
from .launch import Plan, as_bytes, plan, run, same_layout, vectors
from .stats import stats_of
from .tile import argument, counted, locate, moments, place, real_positions, scales, shifts, split


@triton.jit
def _forward(
    input, weight, bias, residual, mask, out, counts, means, variances,
    samples, channels, positions, stride, per_slice, strips, chunks, inner_tiles,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    row, _, channel, known, inner, live, base, first, last = locate(
        samples, channels, positions, per_slice, strips, chunks, inner_tiles, LAST, BN, BI
    )
    n = first + tl.arange(0, BN)
    at, exists = place(n, last, inner, live, base, stride)
    x = tl.load(input + at, mask=exists, other=0.0).to(COMPUTE)
    real = real_positions(mask, n, last, inner, exists, positions, LAST)
    count = counted(mask, n, last, live, real, LAST)
    mean, second = moments(x, real, count, LAST, BN, BI)
    var = second / tl.maximum(count, 1.0)
    to = row * channels + channel
    tl.store(counts + row + channel * 0, count, mask=channel == 0)
    tl.store(means + to, mean, mask=known)
    tl.store(variances + to, var, mask=known)
    high, low = split(mean, COMPUTE)
    _invstd, scale = scales(var, weight, channel, known, EPS)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    _d, z = argument(x, high, scale, shift, residual, at, exists)
    y = activate(z, ACTIVATION, SLOPE)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=exists)


def _one_launch(
    x: Tensor,
    small: list[Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    compiled: dict[str, object],
    cut: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty((cut.rows, cut.channels), dtype=torch.float64)
    out, var, count = torch.empty_like(x), torch.empty_like(mean), mean.new_empty(cut.rows)
    arguments = (x, *small, residual, mask, out, count, mean, var)
    run(_forward, cut.programs, *arguments, *cut.sizes, **cut.meta(x), **compiled)
    return out, mean, var, count


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
    x = dense(input)
    cut, bytes_ = plan(x, slice_size, reduces=True), as_bytes(mask)
    if cut.fused:
        compiled = form(eps, activation, negative_slope)
        return _one_launch(x, vectors(weight, bias), same_layout(residual, x), bytes_, compiled, cut)
    mean, var, count = stats_of(x, bytes_, cut)
    out = apply(x, mean, var, weight, bias, residual, eps, activation, negative_slope, slice_size)
    return out, mean, var, count
