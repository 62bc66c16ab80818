"""The arms of a study in one table: a new arm is one entry here.

The plan, the networks, the report and the command line's help read their names and words from this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ...moments import Renorm


@dataclass(frozen=True)
class NormPlace:
    """A place of a normalization, with a batch normalization for it: the network's own, or one that `insert` has put.

    What another arm puts there has the eps and, if it has them, the momentum and γ, β of `norm`. `spatial_dims` is 0
    after a Linear. `batch_size` and `model` are the study's.
    """

    norm: Any
    spatial_dims: int
    batch_size: int
    model: str

    @property
    def features(self) -> int:
        """Return the number of channels."""
        return int(self.norm.num_features)

    def batch_norm(self, **keywords: Any) -> nn.Module:
        """Return a batch normalization of the same width with these keywords."""
        own = {"eps": self.norm.eps, "momentum": self.norm.momentum, "affine": self.norm.affine}
        kind = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)[self.spatial_dims]
        return kind(self.features, **{**own, **keywords})

    def by_sample(self, groups: int) -> nn.Module:
        """Return a normalization over groups of channels and all positions of a sample."""
        return nn.GroupNorm(groups, self.features, eps=self.norm.eps, affine=self.norm.affine)


def group_width(features: int) -> int:
    """Return the divisor of `features` nearest 16 on a log scale: arXiv 1803.08494, Table 3 (16 a group)."""
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / 16)))


def _layer(place: NormPlace) -> nn.Module:
    # One group: over all channels and positions of one sample, which is layer normalization.
    return place.by_sample(1)


def _group(place: NormPlace) -> nn.Module:
    return place.by_sample(place.features // group_width(place.features))


def _instance(place: NormPlace) -> nn.Module:
    if place.spatial_dims == 0:
        raise UserError(
            "a fully connected layer has one value a channel and nothing for instance normalization to average, "
            f"study(arms=instance) with {place.model}, leave the arm out or use a network whose hidden layers are "
            "convolutions"
        )
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return kinds[place.spatial_dims - 1](place.features, eps=place.norm.eps, affine=place.norm.affine)


class RmsOfSample(nn.Module):
    """Divide by the root of the mean square over all channels and positions of a sample, then scale by channel.

        y = x / √(mean(x²) + eps) · weight

    Shape: (N, C, *), as the input. Source: Zhang & Sennrich, arXiv 1910.07467.
    """

    def __init__(self, features: int, eps: float, affine: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features)) if affine else None

    def extra_repr(self) -> str:
        return f"eps={self.eps}, affine={self.weight is not None}"

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(tuple(range(1, x.dim())), keepdim=True) + self.eps)
        return y if self.weight is None else y * _by_channel(self.weight, x)


class DynamicTanh(nn.Module):
    """Squash by a tanh of learned slope instead of normalizing: y = tanh(alpha · x) · weight + bias.

    Shape: (N, C, *), as the input. Source: Zhu et al., arXiv 2503.10622; alpha starts at 0.5.
    """

    def __init__(self, features: int, affine: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None

    def extra_repr(self) -> str:
        return f"affine={self.weight is not None}"

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.alpha * x)
        if self.weight is None or self.bias is None:
            return y
        return y * _by_channel(self.weight, x) + _by_channel(self.bias, x)


def _by_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(-1, *(1,) * (x.dim() - 2))


@dataclass(frozen=True)
class Arm:
    """One arm: its words in the report, and what makes its layer; None for the network without normalization.

    `written`: the network with the normalizations that its author put, and no other.
    """

    words: str
    make: Callable[[NormPlace], nn.Module] | None
    written: bool = False


ARMS = {
    "as_written": Arm("the network as written", None, written=True),
    "without": Arm("the network without its normalizations", None),
    "none": Arm("no normalization", None),
    "batch": Arm("batch normalization", lambda place: place.norm),
    "batch_no_affine": Arm("batch normalization without γ and β", lambda place: place.batch_norm(affine=False)),
    "ghost": Arm(
        "ghost batch normalization",
        lambda place: place.batch_norm(ghost_batch_size=max(2, place.batch_size // 4)),
    ),
    "renorm": Arm("batch renormalization", lambda place: place.batch_norm(renorm=Renorm(r_max=3.0, d_max=5.0))),
    "layer": Arm("layer normalization", _layer),
    "group": Arm("group normalization", _group),
    "instance": Arm("instance normalization", _instance),
    "rms": Arm(
        "RMS normalization", lambda place: RmsOfSample(place.features, place.norm.eps, affine=place.norm.affine)
    ),
    "dyt": Arm("dynamic tanh", lambda place: DynamicTanh(place.features, affine=place.norm.affine)),
}
