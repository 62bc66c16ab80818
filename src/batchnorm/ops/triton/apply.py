"""apply: y = activation((x − mean)·invstd·weight + bias + residual), one read of x and residual, one write."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import dense
from .activations import activate
from .launch import plan, run, same_layout, stages, vectors
from .tile import argument, given, locate, place, scales, shifts, split


@triton.jit
def _apply(
    input, mean, var, weight, bias, residual, out,
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
    _invstd, scale = scales(sigma2, weight, channel, known, EPS)
    shift = shifts(bias, low, scale, channel, known, COMPUTE)
    scale = scale.to(COMPUTE)
    for chunk in tl.range(chunks, num_stages=STAGES):
        n = first + chunk * BN + tl.arange(0, BN)
        at, exists = place(n, last, inner, live, base, stride)
        x = tl.load(input + at, mask=exists, other=0.0).to(COMPUTE)
        _d, z = argument(x, high, scale, shift, residual, at, exists)
        y = activate(z, ACTIVATION, SLOPE)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=exists)


def form(eps: float, activation: str, negative_slope: float) -> dict[str, Any]:
    """What is compiled into a kernel. A slope that nothing reads must not compile it anew."""
    return {"EPS": eps, "ACTIVATION": activation, "SLOPE": negative_slope if activation == "leaky_relu" else 0.0}


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
    out, cut = torch.empty_like(x), plan(x, slice_size, reduces=False)
    small = vectors(mean, var, weight, bias)
    meta = cut.meta(x) | {"STAGES": stages(x)} | form(eps, activation, negative_slope)
    run(_apply, cut.programs, x, *small, same_layout(residual, x), out, *cut.sizes, **meta)
    return out
