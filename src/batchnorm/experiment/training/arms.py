"""The arms of a study in one table: a new arm is one entry here.

The plan, the networks, the report and the command line's help read their names and words from this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import UserError
from ...moments import Renorm


@dataclass(frozen=True)
class NormPlace:
    """A place after a hidden layer, where `insert` has put the batch normalization `norm`.

    `spatial_dims` is that of the layer: 0 for a Linear. `batch_size` and `model` are the study's.
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
        layer: nn.Module = type(self.norm)(self.features, **keywords)
        return layer


def group_width(features: int) -> int:
    """Return the divisor of `features` nearest 16 on a log scale: arXiv 1803.08494, Table 3 (16 a group)."""
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / 16)))


def _layer(place: NormPlace) -> nn.Module:
    # One group: over all channels and positions of one sample, which is layer normalization.
    return nn.GroupNorm(1, place.features)


def _group(place: NormPlace) -> nn.Module:
    return nn.GroupNorm(place.features // group_width(place.features), place.features)


def _instance(place: NormPlace) -> nn.Module:
    if place.spatial_dims == 0:
        raise UserError(
            "a fully connected layer has one value a channel and nothing for instance normalization to average, "
            f"study(arms=instance) with {place.model}, leave the arm out or use a network whose hidden layers are "
            "convolutions"
        )
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return kinds[place.spatial_dims - 1](place.features, affine=True)


@dataclass(frozen=True)
class Arm:
    """One arm: its words in the report, and what makes its layer; None for the network without normalization."""

    words: str
    make: Callable[[NormPlace], nn.Module] | None


ARMS = {
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
}
