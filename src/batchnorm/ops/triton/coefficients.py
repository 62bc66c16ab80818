"""Compute the coefficients of each channel in a launch of its own, for passes that follow no merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, run
from .tile import PLANES, load_moments, store_coefficients

BLOCK = 128  # channels of a program


@triton.jit
def _coefficients(
    mean, var, weight, bias, sum_dy, sum_dy_xmu, count, coefficients, channels, channel_blocks,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slice_index = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK + tl.arange(0, BLOCK)
    channel_mask = channel < channels
    slice_mean, slice_var = load_moments(mean, var, slice_index, channels, channel, channel_mask)
    slice_sum_dy = None
    slice_sum_dy_xmu = None
    n = None
    if count is not None:
        slice_sum_dy, slice_sum_dy_xmu = load_moments(sum_dy, sum_dy_xmu, slice_index, channels, channel, channel_mask)
        n = tl.load(count + slice_index).to(tl.float64)
    store_coefficients(
        coefficients, slice_index, channels, channel, channel_mask,
        slice_mean, slice_var, weight, bias, slice_sum_dy, slice_sum_dy_xmu, n, EPS,
    )  # fmt: skip


def empty_coefficients(x: Tensor, slices: int) -> Tensor:
    """Allocate coefficients (R, PLANES, C) in the dtype that the kernels compute in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((slices, PLANES.value, x.size(1)), dtype=dtype)


def coefficients(
    x: Tensor,
    vectors: list[Tensor | None],
    sums: tuple[Tensor | None, Tensor | None],
    count: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute the coefficients of a pass.

    Args:
        vectors: mean, var, weight and bias.
        sums: sum_dy and sum_dy_xmu, for the backward with batch statistics.
        count: values of each slice, for the same.
    """
    mean = vectors[0]
    assert mean is not None
    slices, channel_blocks = mean.numel() // x.size(1), ceil_div(x.size(1), BLOCK)
    coefs = empty_coefficients(x, slices)
    sizes = (x.size(1), channel_blocks)
    arguments = (*vectors, *sums, count, coefs, *sizes)
    run(_coefficients, slices * channel_blocks, *arguments, EPS=eps, BLOCK=BLOCK, num_warps=4)
    return coefs
