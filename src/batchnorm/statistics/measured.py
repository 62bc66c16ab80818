"""Moments of a batch normalization's input, in float64, merged over calls by Chan's formula."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Measured", "Pooled", "mask_over", "moments"]


def moments(input: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """Returns mean (C,), biased variance (C,) in float64 and the count, over every axis but 1.

    `real`: bool (N, \\*) without the channel axis; what is False there is selected away, never multiplied.
    """
    x = input.detach().movedim(1, 0).double()
    columns = x.flatten(1) if real is None else x[:, real]
    count = columns.size(1)
    if not count:
        zero = columns.new_zeros(columns.size(0))
        return zero, zero.clone(), 0
    var, mean = torch.var_mean(columns, 1, correction=0)
    return mean, var, count


def mask_over(mask: Tensor | None, input: Tensor) -> Tensor | None:
    """Returns the mask brought to the input's positions, (N, \\*), or None where it does not fit them.

    It may have the input's shape without the channel axis, or with size 1 there; lie over flattened positions,
    (N·L, C); or be larger by whole strides, in which case a position is real when any that it covers is.
    """
    if mask is None:
        return None
    real = mask.to(device=input.device, dtype=torch.bool)
    if real.dim() == input.dim() and real.size(1) == 1 and input.dim() > 2:
        real = real.squeeze(1)
    positions = (input.size(0), *input.shape[2:])
    if input.dim() == 2 and real.numel() == input.size(0):
        return real.reshape(-1)
    if real.dim() != len(positions) or real.size(0) != positions[0]:
        return None
    for axis, size in enumerate(positions[1:], 1):
        if real.size(axis) == size or real.size(axis) == 1:
            continue
        stride = -(-real.size(axis) // size)
        if -(-real.size(axis) // stride) != size:
            return None
        padded = real.new_zeros([stride * size - s if a == axis else s for a, s in enumerate(real.shape)])
        real = torch.cat([real, padded], axis).unflatten(axis, (size, stride)).any(axis + 1)
    return real.expand(positions)


@dataclass
class Pooled:
    """Mean and variance of everything that was added, weighted by count."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    m2: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        if not count:
            return
        if not self.count:
            self.count, self.mean, self.m2 = count, mean, var * count
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + var * count + delta.square() * (self.count * count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        """Biased."""
        return self.m2 / max(1, self.count)

    @property
    def unbiased(self) -> Tensor:
        return self.m2 / max(1, self.count - 1)


@dataclass
class Measured:
    """What the input of one layer was over all batches."""

    pooled: Pooled = field(default_factory=Pooled)
    samples: Pooled = field(default_factory=Pooled)  # of the per-sample means: (N, \\*) averaged over positions
    dropped: Pooled = field(default_factory=Pooled)  # with dropout on, over the batches of `kept`
    kept: Pooled = field(default_factory=Pooled)  # with dropout off, over the same batches
    real: Pooled = field(default_factory=Pooled)  # over the positions that the mask calls real
    every: Pooled = field(default_factory=Pooled)  # over all positions of the same calls
    batch_means: list[Tensor] = field(default_factory=list)
    batch_vars: list[Tensor] = field(default_factory=list)
    batch_counts: list[int] = field(default_factory=list)  # values a channel
    batch_samples: list[int] = field(default_factory=list)
    calls: int = 0  # most calls in one forward
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtype: torch.dtype | None = None
    largest: float = 0.0  # |input| and |output|, of half precision only
    nonfinite: int = 0  # values, of half precision only
    masked_calls: int = 0  # calls that were given a mask of their own
    misfits: int = 0  # calls whose positions the mask does not fit

    def add(self, input: Tensor, mean: Tensor, var: Tensor, count: int) -> None:
        """Adds one call without padding left out."""
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
        """Keeps the extremes of half-precision values; other dtypes hold what they are given."""
        if tensor.dtype == torch.float16 and tensor.numel():
            values = tensor.detach().float().abs()
            finite = values.isfinite()
            self.nonfinite += int((~finite).sum())
            self.largest = max(self.largest, float(values[finite].max()) if finite.any() else 0.0)

    def between_batches(self) -> tuple[Tensor, Tensor]:
        """Returns the standard deviation between batches of their means and of their variances, each (C,)."""
        if len(self.batch_means) < 2:
            nothing = torch.zeros_like(self.pooled.mean)
            return nothing, nothing
        return torch.stack(self.batch_means).std(0), torch.stack(self.batch_vars).std(0)
