"""The moments of a union from the moments of its disjoint parts."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Merge the moments of R disjoint parts.

    .. math:: \mu = \frac{\sum_k n_k \mu_k}{n}, \quad \sigma^2 = \frac{\sum_k n_k (\sigma_k^2 + (\mu_k - \mu)^2)}{n}

    The formula has no :math:`E[x^2] - \mu^2`, in which digits would cancel where the mean is large.

    Args:
        mean, var: (R, C), biased variance. A part without values (n = 0) adds nothing, even if its row holds NaN.
        count: (R,).

    Returns:
        mean (1, C), biased variance (1, C) and count (1,) of the union.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
    """
    n = count.unsqueeze(1)
    mean, var = torch.where(n > 0, mean, 0.0), torch.where(n > 0, var, 0.0)
    total = count.sum().clamp(min=1)
    merged_mean = (n * mean).sum(0, keepdim=True) / total
    merged_var = (n * (var + (mean - merged_mean).square())).sum(0, keepdim=True) / total
    return merged_mean, merged_var, count.sum(0, keepdim=True)
