"""How far running statistics lie from the population's, and how much of that chance alone explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Layer
from .moments import Measured

__all__ = ["Distance", "distance"]

# In standard deviations of the mean's estimate: over a hundred channels, less than one in a hundred exceeds it.
_SIGMAS = 4.0
MEAN_AWAY, MEAN_FAILS = 0.25, 1.0
LOG2_AWAY, LOG2_FAILS = 0.5, 2.0
# Below this weight, what a buffer began with no longer shows.
_FORGOTTEN = 0.01


@dataclass(frozen=True)
class Distance:
    """Largest shift of a mean in standard deviations, largest |log2| of a variance's ratio, and the shares of
    channels beyond the warning and the failing thresholds, chance allowed for."""

    mean_shift: float
    log2_variance: float
    away: float
    failing: float


def distance(layer: Layer, seen: Measured, model_trains: bool) -> Distance | None:
    """Returns None where there are no statistics to compare: none tracked, none finite, none yet learned."""
    if not layer.tracks or layer.frozen or seen.pooled.count < 2 or (model_trains and layer.is_initial):
        return None
    learned = _learned(layer, model_trains)
    if learned is None:
        return None
    mean, var = (t.detach().double().to(seen.pooled.mean.device) for t in learned)
    if not (mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()):
        return None
    population = seen.pooled.unbiased + layer.eps
    if not population.isfinite().all():
        return None
    shift = (mean - seen.pooled.mean).abs() / population.sqrt()
    log2 = ((var + layer.eps) / population).log2().abs()
    mean_noise, log2_noise = _noise(layer, seen, population)
    away = (shift > MEAN_AWAY + mean_noise) | (log2 > LOG2_AWAY + log2_noise)
    failing = (shift > MEAN_FAILS + mean_noise) | (log2 > LOG2_FAILS + log2_noise)
    share = (float(flags.double().mean()) for flags in (away, failing))
    return Distance(float(shift.max()), float(log2.max()), *share)


def _learned(layer: Layer, model_trains: bool) -> tuple[Tensor, Tensor] | None:
    """The running statistics; while the model still trains, without what is left of their initial 0 and 1."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = layer.running_mean.detach().double(), layer.running_var.detach().double()
    if not model_trains or layer.num_batches_tracked is None or not layer.momentum:
        return mean, var
    left = (1 - layer.momentum) ** int(layer.num_batches_tracked)
    if not _FORGOTTEN < left < 1:
        return mean, var
    debiased = (var - left) / (1 - left)
    # A buffer that did not start at 0 and 1 (fine-tuning) must not be "debiased" below zero.
    return (mean / (1 - left), debiased) if bool((debiased >= 0).all()) else None


def _noise(layer: Layer, seen: Measured, population: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how far mean (in σ) and variance (in log2) may be apart by chance, per channel."""
    samples = max(1.0, float(torch.tensor(seen.batch_samples).double().median()))
    values = max(2.0, float(torch.tensor(seen.batch_counts).double().median()))
    between_mean, between_var = seen.between_batches()
    # One batch shows nothing between batches; then what independent samples would give.
    of_means = torch.maximum(between_mean.square(), seen.samples.var / samples)
    of_vars = torch.maximum(between_var.square(), population.square() * 2 / values)
    batches = len(seen.batch_means)
    # An exponential average of weight α is as noisy as the mean of (2−α)/α batches.
    weight = layer.momentum / (2 - layer.momentum) if layer.momentum and layer.momentum < 1 else 0.0
    share = weight + 1 / batches
    return (
        _SIGMAS * (of_means * share / population).sqrt(),
        _SIGMAS * (of_vars * share).sqrt() / population * 1.4427,
    )
