"""The coefficients of each channel for a pass over the elements: one tiny launch, where no merge has written them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, run
from .tile import PLANES, given, store_coefficients

BLOCK = 128  # channels a program takes


@triton.jit
def _coefficients(
    mean, var, weight, bias, sum_dy, sum_dy_xmu, count, coefficients, channels, tiles,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    channel = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    known = channel < channels
    mu, sigma2 = given(mean, var, row, channels, channel, known)
    along = None
    across = None
    n = None
    if count is not None:
        along, across = given(sum_dy, sum_dy_xmu, row, channels, channel, known)
        n = tl.load(count + row).to(tl.float64)
    store_coefficients(
        coefficients, row, channels, channel, known, mu, sigma2, weight, bias, along, across, n, EPS
    )  # fmt: skip


def room(x: Tensor, rows: int) -> Tensor:
    """(R, PLANES, C) in the dtype that the kernels compute in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((rows, PLANES.value, x.size(1)), dtype=dtype)


def coefficients(
    x: Tensor, small: list[Tensor | None], sums: tuple[Tensor | None, Tensor | None], count: Tensor | None, eps: float
) -> Tensor:
    """From (mean, var, weight, bias) and, where the moments are the batch's own, the sums of the backward."""
    mean = small[0]
    assert mean is not None
    rows, tiles = mean.numel() // x.size(1), ceil_div(x.size(1), BLOCK)
    found = room(x, rows)
    sizes = (x.size(1), tiles)
    run(_coefficients, rows * tiles, *small, *sums, count, found, *sizes, EPS=eps, BLOCK=BLOCK, num_warps=4)
    return found
