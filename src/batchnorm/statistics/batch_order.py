"""Test whether batches look drawn at random: the variance of their means against the variance that chance gives."""

from __future__ import annotations

import torch

from .measured import Measured

__all__ = ["likely_ratio", "variance_ratio"]

RATIO = 2.0


def variance_ratio(seen: Measured) -> float:
    """Compute Σ nᵢ(mᵢ−m)²/(B−1) over the variance of the per-sample means, averaged over channels.

    Random batches give 1. Batches of one sample give 0, because they vary as samples do.
    """
    sizes = torch.tensor(seen.batch_samples, dtype=torch.float64)
    if len(sizes) < 2 or float(sizes.median()) < 2:
        return 0.0
    means = torch.stack(seen.batch_means)
    sizes = sizes.to(means.device)[:, None]
    between = (sizes * (means - (sizes * means).sum(0) / sizes.sum()).square()).sum(0) / (len(means) - 1)
    within = seen.samples.unbiased
    alive = within > 1e-12
    return float((between[alive] / within[alive]).mean()) if alive.any() else 0.0


def likely_ratio(batches: int) -> float:
    """Compute the ratio up to which this number of batches may be random: 2, and more for few batches.

    The second number is the one that χ²/freedom exceeds once in ten thousand (Wilson & Hilferty). It does not average
    over channels, because all channels may vary together.
    """
    spread = 2 / (9 * max(1, batches - 1))
    return max(RATIO, (1 - spread + 3.719 * spread**0.5) ** 3)
