"""The moments of a union from the moments of its parts."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""One row from R disjoint parts, exactly: no :math:`E[x^2] - \mu^2`, so nothing cancels.

    .. math:: \mu = \frac{\sum_k n_k \mu_k}{n}, \quad \sigma^2 = \frac{\sum_k n_k (\sigma_k^2 + (\mu_k - \mu)^2)}{n}

    Args:
        mean, var: (R, C), biased variance. A part without values (n = 0) adds nothing, whatever its row holds.
        count: (R,).

    Returns:
        (1, C), (1, C), (1,).

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
    """
    n = count.unsqueeze(1)
    mean, var = torch.where(n > 0, mean, 0.0), torch.where(n > 0, var, 0.0)
    total = count.sum().clamp(min=1)
    pooled = (n * mean).sum(0, keepdim=True) / total
    spread = (n * (var + (mean - pooled).square())).sum(0, keepdim=True) / total
    return pooled, spread, count.sum(0, keepdim=True)
