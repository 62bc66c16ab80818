"""Which memory layouts the operators work in, and the (N, C, S) view of them all."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(input: Tensor) -> Tensor:
    """The input itself where it is contiguous or has its channels innermost; else one copy in the nearer of these."""
    if input.is_contiguous():
        return input
    channels_innermost = input.movedim(1, -1)
    if channels_innermost.is_contiguous():
        return input
    if input.stride(1) == 1 and input.size(1) > 1:
        return channels_innermost.contiguous().movedim(-1, 1)
    return input.contiguous()


def flat(input: Tensor) -> Tensor:
    """(N, C, *) as (N, C, S), S the product of the spatial sizes (1 for a fully connected layer)."""
    return input.unsqueeze(2) if input.dim() == 2 else input.flatten(2)


def slices(samples: int, slice_size: int) -> int:
    """How many rows of moments a batch has: one, or one for each started slice of `slice_size` samples."""
    return max(1, -(-samples // slice_size)) if slice_size else 1


def per_slice(values: Tensor, slice_size: int) -> Tensor:
    """Sum (N, ...) over each slice's samples: (R, ...)."""
    samples = values.size(0)
    rows = slices(samples, slice_size)
    missing = rows * slice_size - samples if slice_size else 0
    if missing:
        values = torch.cat([values, values.new_zeros((missing, *values.shape[1:]))])
    return (
        values.reshape(rows, values.size(0) // rows, *values.shape[1:]).sum(1)
        if values.size(0)
        else values.new_zeros((rows, *values.shape[1:]))
    )


def per_sample(rows: Tensor, samples: int, slice_size: int) -> Tensor:
    """(R, C) as (N, C, 1), or (1, C, 1) where one row serves the whole batch."""
    if slice_size:
        rows = rows.repeat_interleave(slice_size, 0)[:samples]
    return rows.unsqueeze(-1)
