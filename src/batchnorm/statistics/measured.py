"""What the input of a batch normalization was, over calls: its moments in float64, per batch and pooled."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .pool import Pool

__all__ = ["Measured", "mask_over", "moments"]


def moments(input: Tensor, valid_mask: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Compute the moments over every axis except 1.

    Args:
        input: (N, C, \\*).
        valid_mask: bool (N, \\*), True at valid pixels. The others are left out by selection, because they may be NaN.

    Returns:
        mean (C,) and biased variance (C,), both float64, and the count.
    """
    x = input.detach().movedim(1, 0).double()
    columns = x.flatten(1) if valid_mask is None else x[:, valid_mask]
    count = columns.size(1)
    if not count:
        zero = columns.new_zeros(columns.size(0))
        return zero, zero.clone(), 0
    var, mean = torch.var_mean(columns, 1, correction=0)
    return mean, var, count


def mask_over(mask: Tensor | None, input: Tensor) -> Tensor | None:
    """Convert a mask to the input's pixels, (N, \\*). Returns None where it does not fit.

    The mask may have the input's shape without the channel axis or with size 1 there, or belong to an input (N·L, C)
    with flattened positions. It may also be larger by an integer stride, as the mask of a network's input is. A pixel
    is then valid when the mask has any valid pixel in its stride.
    """
    if mask is None:
        return None
    valid_mask = mask.to(device=input.device, dtype=torch.bool)
    if valid_mask.dim() == input.dim() and valid_mask.size(1) == 1 and input.dim() > 2:
        valid_mask = valid_mask.squeeze(1)
    pixels = (input.size(0), *input.shape[2:])
    if input.dim() == 2 and valid_mask.numel() == input.size(0):
        return valid_mask.reshape(-1)
    if valid_mask.dim() != len(pixels) or valid_mask.size(0) != pixels[0]:
        return None
    for axis, size in enumerate(pixels[1:], 1):
        if valid_mask.size(axis) == size or valid_mask.size(axis) == 1:
            continue
        stride = -(-valid_mask.size(axis) // size)
        if -(-valid_mask.size(axis) // stride) != size:
            return None
        padded = valid_mask.new_zeros([stride * size - s if a == axis else s for a, s in enumerate(valid_mask.shape)])
        valid_mask = torch.cat([valid_mask, padded], axis).unflatten(axis, (size, stride)).any(axis + 1)
    return valid_mask.expand(pixels)


@dataclass
class Measured:
    """What the input of one layer was, over all batches."""

    pooled: Pool = field(default_factory=Pool)
    samples: Pool = field(default_factory=Pool)  # of the samples' means over their pixels
    dropout_on: Pool = field(default_factory=Pool)  # of the input with dropout on, over the batches of `dropout_off`
    dropout_off: Pool = field(default_factory=Pool)  # of the input with dropout off, over the same batches
    valid_pixels: Pool = field(default_factory=Pool)  # over the valid pixels of the mask
    all_pixels: Pool = field(default_factory=Pool)  # over all pixels of the same calls
    batch_means: list[Tensor] = field(default_factory=list)
    batch_vars: list[Tensor] = field(default_factory=list)
    batch_counts: list[int] = field(default_factory=list)  # values per channel
    batch_samples: list[int] = field(default_factory=list)
    calls: int = 0  # most calls in one forward
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtype: torch.dtype | None = None
    largest: float = 0.0  # |input| and |output|, of float16 only
    nonfinite: int = 0  # values, of float16 only
    masked_calls: int = 0  # calls with a mask argument
    misfits: int = 0  # calls whose pixels the mask does not fit

    def add(self, input: Tensor, mean: Tensor, var: Tensor, count: int) -> None:
        """Add one call, by its input and the moments over all its pixels."""
        self.pooled.add(mean, var, count)
        self.batch_means.append(mean)
        self.batch_vars.append(var)
        self.batch_counts.append(count)
        self.batch_samples.append(input.size(0))
        self.shapes.append(tuple(input.shape))
        self.dtype = input.dtype
        if input.size(0):
            each = input.detach().double().flatten(2).mean(2) if input.dim() > 2 else input.detach().double()
            sample_var, sample_mean = torch.var_mean(each, 0, correction=0)
            self.samples.add(sample_mean, sample_var, input.size(0))

    def note_range(self, tensor: Tensor) -> None:
        """Update the extremes of float16 values. Other dtypes have a larger range and are not watched."""
        if tensor.dtype == torch.float16 and tensor.numel():
            values = tensor.detach().float().abs()
            finite = values.isfinite()
            self.nonfinite += int((~finite).sum())
            self.largest = max(self.largest, float(values[finite].max()) if finite.any() else 0.0)

    def between_batches(self) -> tuple[Tensor, Tensor]:
        """Compute the standard deviation over batches of their means and of their variances, each (C,)."""
        if len(self.batch_means) < 2:
            zero = torch.zeros_like(self.pooled.mean)
            return zero, zero
        return torch.stack(self.batch_means).std(0), torch.stack(self.batch_vars).std(0)
