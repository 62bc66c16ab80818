"""Whether batches look drawn at random: how much their means differ, against what chance alone gives."""

from __future__ import annotations

import torch

from .measured import Measured

__all__ = ["likely_ratio", "variance_ratio"]

RATIO = 2.0


def variance_ratio(seen: Measured) -> float:
    """Σ nᵢ(mᵢ−m)²/(B−1) over the variance of the per-sample means: 1 for random batches, on average over channels."""
    sizes = torch.tensor(seen.batch_samples, dtype=torch.float64)
    if len(sizes) < 2 or float(sizes.median()) < 2:
        return 0.0  # batches of one sample vary as samples do
    means = torch.stack(seen.batch_means)
    sizes = sizes.to(means.device)[:, None]
    between = (sizes * (means - (sizes * means).sum(0) / sizes.sum()).square()).sum(0) / (len(means) - 1)
    within = seen.samples.unbiased
    alive = within > 1e-12
    return float((between[alive] / within[alive]).mean()) if alive.any() else 0.0


def likely_ratio(batches: int) -> float:
    """The ratio up to which so many batches may be random: 2, and more where there are few.

    χ²/freedom exceeds the second number once in ten thousand (Wilson & Hilferty): all channels may move as one.
    """
    spread = 2 / (9 * max(1, batches - 1))
    return max(RATIO, (1 - spread + 3.719 * spread**0.5) ** 3)
