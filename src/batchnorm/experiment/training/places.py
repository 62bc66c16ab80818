"""The normalizations that a network has as it was written: where they stand, and what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...inspect.folding import only_normalizes
from ...inspect.modules import is_norm
from ...layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .probe import trace_calls

_OVER_CHANNELS = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_OVER_LAST = (nn.LayerNorm, nn.RMSNorm)
# torch's defaults, for what has none of its own.
_MOMENTUM, _RMS_EPS = 0.1, torch.finfo(torch.float32).eps


class LastAxis(nn.Module):
    """Apply a normalization of (N, C) to the last axis of (*, C); all axes before it are the batch."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return y


@dataclass(frozen=True)
class OwnPlace:
    """One normalization of the network, `spatial_dims` axes behind its channels; 0 where the channels are the last."""

    norm: nn.Module
    features: int
    spatial_dims: int
    channels_last: bool

    def batch_norm(self) -> nn.Module:
        """Return the batch normalization for the place: the network's own, or one with its eps and affine."""
        if is_norm(self.norm):
            return self.norm
        kind = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)[self.spatial_dims]
        eps = getattr(self.norm, "eps", None)
        return kind(
            self.features,
            eps=_RMS_EPS if eps is None else eps,
            momentum=getattr(self.norm, "momentum", _MOMENTUM),
            affine=getattr(self.norm, "weight", None) is not None,
        )

    def fit(self, layer: nn.Module) -> nn.Module:
        """Return the layer as it has to be called in the place."""
        return LastAxis(layer) if self.channels_last else layer


def own_places(model: nn.Module, example: Tensor) -> dict[nn.Module, OwnPlace]:
    """Return the network's normalizations that a run of the example calls.

    Raises:
        UserError: one that does more than normalize, or has no single channel axis.
    """
    found: dict[nn.Module, OwnPlace] = {}
    for call in trace_calls(model, example):
        norm, shape = call.module, call.shape
        if is_norm(norm):
            if not only_normalizes(norm):
                raise UserError(
                    f"{call.name} is a {type(norm).__name__} that does more than normalize, study(where=same), write "
                    "the factory as build(arm, seed) and make the arm in it"
                )
            found[norm] = OwnPlace(norm, shape[1], len(shape) - 2, channels_last=False)
        elif isinstance(norm, _OVER_CHANNELS):
            found[norm] = OwnPlace(norm, shape[1], len(shape) - 2, channels_last=False)
        elif isinstance(norm, _OVER_LAST):
            if len(norm.normalized_shape) != 1:
                raise UserError(
                    f"{call.name} normalizes over {len(norm.normalized_shape)} axes, study(where=same), write the "
                    "factory as build(arm, seed) and make the arm in it"
                )
            found[norm] = OwnPlace(norm, shape[-1], 0, channels_last=True)
    return found
