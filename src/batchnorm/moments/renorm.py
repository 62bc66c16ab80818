"""Batch renormalization: training normalizes as evaluation will, to within clipped corrections r and d."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Renorm:
    r"""The two bounds of batch renormalization, and when they are reached.

    .. math:: \hat x = \frac{x - \mu_B}{\sigma_B} r + d, \quad
        r = \mathrm{clip}\left(\frac{\sigma_B}{\sigma}, \frac{1}{r_{max}}, r_{max}\right), \quad
        d = \mathrm{clip}\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    μ, σ are the running statistics before this batch, σ = √(var + ε); no gradient goes through r and d. With
    ``r_max=1, d_max=0`` this is batch normalization.

    Args:
        r_max: ≥ 1; bound of r.
        d_max: ≥ 0; bound of d, in standard deviations.
        r_steps: (first, last) step between which the bound of r grows linearly from 1 to ``r_max``; None: ``r_max``
            from the start. Steps are counted by ``num_batches_tracked``, so a checkpoint resumes the schedule.
        d_steps: the same for d, from 0 to ``d_max``.

    Raises:
        ValueError: bounds or steps out of range.

    Source: Ioffe 2017, https://arxiv.org/abs/1702.03275; `Renorm.paper()` is its schedule.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    r_steps: tuple[int, int] | None = None
    d_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.r_max >= 1:
            raise ValueError(f"Renorm: r_max must be at least 1, got {self.r_max}")
        if not self.d_max >= 0:
            raise ValueError(f"Renorm: d_max must not be negative, got {self.d_max}")
        for name, steps in (("r_steps", self.r_steps), ("d_steps", self.d_steps)):
            if steps is not None and not 0 <= steps[0] < steps[1]:
                raise ValueError(f"Renorm: {name} must be (first, last) with 0 <= first < last, got {steps}")

    @classmethod
    def paper(cls) -> Renorm:
        """Batch normalization for 5,000 steps, then r up to 3 by step 40,000 and d up to 5 by step 25,000."""
        return cls(3.0, 5.0, (5_000, 40_000), (5_000, 25_000))

    def bounds(self, step: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
        """(r_max, d_max) at a step; on the step's device, without a synchronization."""
        return (
            1.0 + (self.r_max - 1.0) * _progress(step, self.r_steps),
            self.d_max * _progress(step, self.d_steps),
        )


def _progress(step: Tensor | None, steps: tuple[int, int] | None) -> float | Tensor:
    if steps is None:
        return 1.0
    if step is None:
        raise ValueError("a Renorm schedule counts steps by num_batches_tracked: give that counter")
    return ((step.double() - steps[0]) / (steps[1] - steps[0])).clamp(0.0, 1.0)


def corrections(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    bounds: tuple[float | Tensor, float | Tensor],
) -> tuple[Tensor, Tensor]:
    """r and d, (R, C) float64, without gradient."""
    r_max, d_max = (torch.as_tensor(b, dtype=torch.float64, device=mean.device) for b in bounds)
    spread = (running_var.detach().double() + eps).sqrt()
    r = ((var.detach() + eps).sqrt() / spread).clamp(1 / r_max, r_max)
    d = ((mean.detach() - running_mean.detach().double()) / spread).clamp(-d_max, d_max)
    return r, d


def renormalize(mean: Tensor, var: Tensor, r: Tensor, d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The moments with which plain normalization gives x̂·r + d: μ − dσ/r, and a variance of σ²/r² (with its ε)."""
    total = var + eps
    return mean - d * total.sqrt() / r, total / r.square() - eps


def renormalize_adjoint(
    sum_dy: Tensor, sum_dy_xmu: Tensor, var: Tensor, r: Tensor, d: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The sums for dx, from the sums about the renormalized mean and variance.

    With s' = r·s and δ = μ' − μ = −d/s', Σdz(x−μ) = S₂' + δS₁; dx needs dz − S₁/n − (x−μ)s²S₂/n, in which
    x − μ = (x − μ') + δ.
    """
    invstd = (var + eps).rsqrt()
    shift = -d / invstd
    about_batch_mean = sum_dy_xmu + shift * sum_dy
    along = about_batch_mean / r.square()
    return sum_dy + shift * invstd.square() * along, along
