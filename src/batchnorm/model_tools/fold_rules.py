"""The arithmetic of folding y = s·x + t into a layer before or after it, in float64.

s = γ/√(σ²+ε) and t = β − μ·s. Before the normalization: W'[o] = s_o·W[o] and b' = s·b + t. After it:
W'[o, i] = W[o, i]·s_i and b'[o] = b[o] + Σ_i W[o, i]·t_i, with the old W. Grouped layers hold W[o, i] only
for the i of o's group; a ConvTranspose holds W[i, o].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inspect.folding import is_transposed, pads_with_zeros
from ..inspect.modules import out_features, spatial_dims

__all__ = ["PaddedWith", "fold_after", "fold_before"]


def _grouped(layer: Any) -> Tensor:
    """The weight in float64 as (groups, out/groups, in/groups, *kernel); a view where the layer's is one."""
    weight: Tensor = layer.weight.detach().double()
    groups = getattr(layer, "groups", 1)
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2) if is_transposed(layer) else split


def _set(layer: Any, grouped: Tensor, bias: Tensor) -> None:
    old = layer.weight
    weight = (grouped.transpose(1, 2) if is_transposed(layer) else grouped).reshape(old.shape)
    layer.weight = nn.Parameter(weight.to(old), requires_grad=old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old), requires_grad=old.requires_grad)


def _bias(layer: Any) -> Tensor:
    if layer.bias is None:
        return torch.zeros(out_features(layer), dtype=torch.float64, device=layer.weight.device)
    return layer.bias.detach().double()


def _ones(grouped: Tensor) -> tuple[int, ...]:
    return (1,) * (grouped.dim() - 3)


def fold_before(layer: nn.Module, s: Tensor, t: Tensor) -> None:
    """Make the layer compute s·layer(x) + t, per channel of its result."""
    w = _grouped(layer)
    scale = s.view(w.shape[0], w.shape[1], 1, *_ones(w))
    _set(layer, w * scale, _bias(layer) * s + t)


def fold_after(layer: Any, s: Tensor, t: Tensor) -> nn.Module:
    """A layer that computes layer(s·x + t), per channel of the input: the same object, or padded with what the
    normalization would turn into the old padding."""
    w = _grouped(layer)
    shape = (w.shape[0], 1, w.shape[2], *_ones(w))
    moved = (w * t.view(shape)).flatten(2).sum(2).flatten()
    _set(layer, w * s.view(shape), _bias(layer) + moved)
    if not pads_with_zeros(layer) or not t.any():
        return layer
    value = torch.where(s == 0, 0.0, -t / torch.where(s == 0, 1.0, s))
    return PaddedWith(layer, value)


class PaddedWith(nn.Module):
    """A convolution whose input is padded with a value of its own in each channel, instead of with zeros."""

    value: Tensor

    def __init__(self, layer: Any, value: Tensor) -> None:
        super().__init__()
        self.pads = list(layer._reversed_padding_repeated_twice)
        self.layer = layer
        shape = (-1, *(1,) * spatial_dims(layer))
        self.register_buffer("value", value.to(layer.weight).view(shape))
        layer.padding = (0,) * spatial_dims(layer)
        layer._reversed_padding_repeated_twice = [0] * len(self.pads)
        self.training = layer.training

    def forward(self, input: Tensor) -> Tensor:
        inside = F.pad(torch.ones_like(input[:1, :1] if input.dim() > self.value.dim() else input[:1]), self.pads)
        padded: Tensor = torch.where(inside.bool(), F.pad(input, self.pads), self.value)
        return self.layer(padded)
