"""apply: y = activation((x − mean)·invstd·weight + bias + residual), one read of x and residual, one write."""

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
from .launch import SIZES, plan, run, same_layout, vectors
from .tile import argument, coefficient, inside, locate, place, read, write


@triton.jit(do_not_specialize=SIZES)
def _apply(
    input, coefficients, residual, out,
    samples, channels, units, vectors, magic, bits, per_slice, strips, chunks, tiles,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    COMPUTE: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, _strip, channel, known, first, last, chunks = locate(
        samples, channels, per_slice, strips, chunks, tiles, LAST, BN, BI
    )
    high = coefficient(coefficients, 0, row, channels, channel, known)
    scale = coefficient(coefficients, 1, row, channels, channel, known)
    shift = coefficient(coefficients, 2, row, channels, channel, known)
    for chunk in tl.range(chunks, num_stages=STAGES):
        n = first + chunk * BN + tl.arange(0, BN)
        at = place(n, channel, units, vectors, magic, bits, LAST, UNIT, WIDE)
        exists = inside(n, last, known, LAST, EVEN)
        x = read(input, at, exists, COMPUTE)
        _d, z = argument(x, high, scale, shift, residual, at, exists)
        y = activate(z, ACTIVATION, SLOPE)
        write(out, at, y, exists)


def form(activation: str, negative_slope: float) -> dict[str, Any]:
    """What is compiled into a kernel. A slope that nothing reads must not compile it anew."""
    return {"ACTIVATION": activation, "SLOPE": negative_slope if activation == "leaky_relu" else 0.0}


def applied(
    x: Tensor, found: Tensor, residual: Tensor | None, activation: str, negative_slope: float, slice_size: int
) -> Tensor:
    """The output, given the coefficients. x is dense, the residual in its memory order."""
    out, cut = torch.empty_like(x), plan(x, slice_size, launch.APPLY)
    meta = {"STAGES": 1} | cut.meta() | form(activation, negative_slope)
    run(_apply, cut.programs, x, found, residual, out, *cut.sizes, **meta)
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
    found = coefficients(x, vectors(mean, var, weight, bias), (None, None), None, eps)
    return applied(x, found, same_layout(residual, x), activation, negative_slope, slice_size)
