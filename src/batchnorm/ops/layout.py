"""The two memory layouts that the operators work in, and the (N, C, S) view of both."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(input: Tensor) -> Tensor:
    """Return the input where it is contiguous or channels_last; else one copy in one of these layouts.

    The copy is channels_last where adjacent channels are adjacent in memory, contiguous otherwise.
    """
    if input.is_contiguous():
        return input
    channels_last = input.movedim(1, -1)
    if channels_last.is_contiguous():
        return input
    if input.stride(1) == 1 and input.size(1) > 1:
        return channels_last.contiguous().movedim(-1, 1)
    return input.contiguous()


def flat(input: Tensor) -> Tensor:
    """View (N, C, *) as (N, C, S). S is the number of pixels of a sample, 1 for a fully connected layer."""
    return input.unsqueeze(2) if input.dim() == 2 else input.flatten(2)


def slice_count(samples: int, slice_size: int) -> int:
    """Return R, the number of ghost slices. The last slice may have fewer than `slice_size` samples."""
    return max(1, -(-samples // slice_size)) if slice_size else 1


def per_slice(values: Tensor, slice_size: int) -> Tensor:
    """Sum (N, ...) over the samples of each slice. Returns (R, ...)."""
    samples = values.size(0)
    rows = slice_count(samples, slice_size)
    missing = rows * slice_size - samples if slice_size else 0
    if missing:
        values = torch.cat([values, values.new_zeros((missing, *values.shape[1:]))])
    if not values.size(0):
        return values.new_zeros((rows, *values.shape[1:]))
    return values.reshape(rows, values.size(0) // rows, *values.shape[1:]).sum(1)


def per_sample(rows: Tensor, samples: int, slice_size: int) -> Tensor:
    """Expand (R, C) to (N, C, 1), each sample with its slice's row; (1, C, 1) where the batch is one slice."""
    if slice_size:
        rows = rows.repeat_interleave(slice_size, 0)[:samples]
    return rows.unsqueeze(-1)
