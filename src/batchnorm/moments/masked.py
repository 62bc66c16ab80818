"""Masked statistics: convert a mask to the (N, S) form that the operators take."""

from __future__ import annotations

import torch
from torch import Tensor


def lengths_to_mask(lengths: Tensor, size: int) -> Tensor:
    """Make a mask that is True for the first `lengths[i]` of `size` positions of sequence i.

    Args:
        lengths: (N,), integers from 0 to `size`.
        size: L, the padded length.

    Returns:
        (N, L) bool, a `mask` for an input of shape (N, C, L).

    Raises:
        ValueError: `lengths` is not a vector of integers.
    """
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be a vector of integers, got {lengths.dtype} of shape {tuple(lengths.shape)}")
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def flat_mask(mask: Tensor, input: Tensor) -> Tensor:
    """Convert the mask of an input (N, C, *) to (N, S), with S pixels per sample.

    Args:
        mask: bool, True at valid pixels. Its shape is the input's without axis 1, or with size 1 there, or broadcasts
            to that.

    Returns:
        (N, S) bool, contiguous.

    Raises:
        ValueError: another dtype or device, or a shape that does not broadcast.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = a real position), got {mask.dtype}: compare it first, mask > 0")
    samples, _, *spatial = input.shape
    wanted = (samples, 1, *spatial)
    full = mask if mask.dim() == input.dim() else None
    if mask.dim() < input.dim():
        missing = input.dim() - 1 - mask.dim()
        full = mask.reshape((1,) * missing + mask.shape).unsqueeze(1)
    if full is None or any(have != 1 and have != want for have, want in zip(full.shape, wanted, strict=True)):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit the input of shape {tuple(input.shape)}: it must be "
            f"broadcastable to {(samples, *spatial)} or {wanted}, the input's shape without its channels"
        )
    if mask.device != input.device:
        raise ValueError(f"mask is on {mask.device}, the input on {input.device}: move the mask")
    return full.expand(wanted).flatten(1).contiguous()
