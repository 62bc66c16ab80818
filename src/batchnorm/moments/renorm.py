"""Batch renormalization: training normalizes as evaluation does, within the bounds of the corrections r and d."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Renorm:
    r"""The bounds of r and d in batch renormalization, and the steps in which they grow.

    .. math:: \hat x = \frac{x - \mu_B}{\sigma_B} r + d, \quad
        r = \mathrm{clip}\left(\frac{\sigma_B}{\sigma}, \frac{1}{r_{max}}, r_{max}\right), \quad
        d = \mathrm{clip}\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    μ and σ = √(var + ε) are the running statistics before this batch. r and d are constants for the gradient. With
    ``r_max=1, d_max=0`` this is batch normalization.

    Args:
        r_max: bound of r, at least 1.
        d_max: bound of d in standard deviations, at least 0.
        r_steps: (first, last): between these steps the bound of r grows linearly from 1 to ``r_max``. None: the bound
            is ``r_max`` from the start. ``num_batches_tracked`` counts the steps, so a checkpoint resumes the schedule.
        d_steps: the same for the bound of d, from 0 to ``d_max``.

    Raises:
        ValueError: bounds or steps are out of range.

    Source: Ioffe 2017, https://arxiv.org/abs/1702.03275. `Renorm.paper()` is its schedule.
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
        """Return the paper's schedule: no correction until step 5,000, r up to 3 at 40,000 and d up to 5 at 25,000."""
        return cls(3.0, 5.0, (5_000, 40_000), (5_000, 25_000))

    def bounds(self, step: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
        """Compute the bounds of r and of d at a step, on the step's device: the host does not wait for it."""
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


class Reference(NamedTuple):
    """The running statistics before this batch, which renormalization corrects toward, and the bounds of r and d."""

    running_mean: Tensor
    running_var: Tensor
    bounds: tuple[float | Tensor, float | Tensor]


def corrections(mean: Tensor, var: Tensor, against: Reference, eps: float) -> tuple[Tensor, Tensor]:
    """Compute r and d, (R, C) float64, as constants for the gradient."""
    r_max, d_max = (torch.as_tensor(b, dtype=torch.float64, device=mean.device) for b in against.bounds)
    running_std = (against.running_var.detach().double() + eps).sqrt()
    r = ((var.detach() + eps).sqrt() / running_std).clamp(1 / r_max, r_max)
    d = ((mean.detach() - against.running_mean.detach().double()) / running_std).clamp(-d_max, d_max)
    return r, d


def renormalize(mean: Tensor, var: Tensor, r: Tensor, d: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the moments with which batch normalization gives x̂·r + d.

    mean′ = mean − d·σ/r and var′ + ε = σ²/r², with σ² = var + ε.
    """
    var_eps = var + eps
    return mean - d * var_eps.sqrt() / r, var_eps / r.square() - eps


def renormalize_adjoint(
    sum_dy: Tensor, sum_dy_xmu: Tensor, var: Tensor, r: Tensor, d: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the sums that `backward_elemt` needs, from the sums with the renormalized moments.

    The batch has mean and s = invstd. The renormalized moments are mean′ = mean + δ and s′ = r·s, with δ = −d/s′.
    The batch's second sum is S₂ = Σ dz·(x − mean) = sum_dy_xmu + δ·sum_dy, and the gradient of x contains
    dz − sum_dy/n − (x − mean)·s²·S₂/n. `backward_elemt` computes this with x − mean′ and s′. Hence x − mean is
    replaced by (x − mean′) + δ, and s² by s′²/r².

    Args:
        sum_dy, sum_dy_xmu: Σ dz and Σ dz·(x − mean′).
        var: the renormalized variance.
    """
    invstd = (var + eps).rsqrt()
    delta = -d / invstd
    batch_sum_dy_xmu = sum_dy_xmu + delta * sum_dy
    sum_dy_xmu = batch_sum_dy_xmu / r.square()
    return sum_dy + delta * invstd.square() * sum_dy_xmu, sum_dy_xmu
