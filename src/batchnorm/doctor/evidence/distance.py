"""How far running statistics are from those of the population, and how much of that chance explains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...statistics.measured import Measured
from .normalizations import Layer

__all__ = ["Distance", "distance"]

# In standard errors. By chance, fewer than one in a hundred layers of a hundred channels exceeds it.
_SIGMAS = 4.0
MEAN_AWAY, MEAN_FAILS = 0.25, 1.0
LOG2_AWAY, LOG2_FAILS = 0.5, 2.0
# During training the buffers follow weights that move, fast at first. Only what this cannot explain counts.
_WHILE_TRAINING, _WHILE_YOUNG = (1.0, 2.0), (2.0, 4.0)
# Weight of its initial value from which a buffer shows that value no longer.
_FORGOTTEN = 0.01
_AGES = (1, 2, 3, 5, 8, 13, 21, 34)


@dataclass(frozen=True)
class Distance:
    """Distance of the running statistics of one layer from those of the population.

    Attributes:
        mean_shift: largest shift of a mean, in standard deviations.
        log2_variance: largest |log2| of the ratio of variances.
        away, failing: shares of the channels beyond the warning and the error thresholds, chance subtracted.
        young: over 1 % of the buffers is still their initial value.
    """

    mean_shift: float
    log2_variance: float
    away: float
    failing: float
    young: bool = False


def distance(layer: Layer, seen: Measured, model_trains: bool) -> Distance | None:
    """Return the distance; None where the statistics are not tracked, not finite, or not yet learned.

    While a model trains, a layer that is held at its statistics trains on them: evaluation will not differ.
    """
    given = model_trains and (layer.frozen or layer.is_initial)
    if not layer.tracks or given or seen.pooled.count < 2:
        return None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    device = seen.pooled.mean.device
    mean, var = (b.detach().double().to(device) for b in (layer.running_mean, layer.running_var))
    population = seen.pooled.unbiased + layer.eps
    if not all(t.isfinite().all() for t in (mean, var, population)) or not (var >= 0).all():
        return None
    ages: tuple[float, ...] = (float("inf"),)
    if layer.num_batches_tracked is not None:
        ages = (float(layer.num_batches_tracked) or float("inf"),)  # 0: loaded from a state that has no counter
    elif model_trains:
        ages = (*_AGES, *ages)  # not known: take the age that explains the buffers best
    found = [_at_age(layer, seen, mean, var, age, model_trains) for age in ages]
    return min(found, key=lambda d: (d.failing, d.away))


def _at_age(layer: Layer, seen: Measured, mean: Tensor, var: Tensor, age: float, model_trains: bool) -> Distance:
    """The distance of buffers that so many batches have moved; while the model trains, without what is left in them
    of their initial 0 and 1."""
    left = (1 - layer.momentum) ** age if layer.momentum and 0 < layer.momentum < 1 else 0.0
    young = left > _FORGOTTEN
    if young and model_trains:
        # Buffers that did not start at 0 and 1 (fine-tuning) could give a negative variance here.
        mean, var = mean / (1 - left), ((var - left) / (1 - left)).clamp(min=0.0)
    population = seen.pooled.unbiased + layer.eps
    shift = (mean - seen.pooled.mean).abs() / population.sqrt()
    log2 = ((var + layer.eps) / population).log2().abs()
    mean_noise, log2_noise = _noise(layer, seen, population)
    limits = ((MEAN_AWAY, LOG2_AWAY), (MEAN_FAILS, LOG2_FAILS))
    if model_trains:
        limits = (_WHILE_YOUNG if young else _WHILE_TRAINING,) * 2
    away, failing = (
        float(((shift > mean_limit + mean_noise) | (log2 > log2_limit + log2_noise)).double().mean())
        for mean_limit, log2_limit in limits
    )
    return Distance(float(shift.max()), float(log2.max()), away, failing, young)


def _noise(layer: Layer, seen: Measured, population: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far mean (in σ) and variance (in log2) may differ by chance, for each channel."""
    samples = max(1.0, float(torch.tensor(seen.batch_samples).double().median()))
    values = max(2.0, float(torch.tensor(seen.batch_counts).double().median()))
    between_mean, between_var = seen.between_batches()
    # One batch shows no difference between batches. Then the noise is that of independent samples.
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
