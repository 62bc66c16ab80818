"""The arithmetic of folding y = s·x + t into a layer, against the two steps one after the other in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.model_tools.fold_rules import PaddedWith, fold_after, fold_before

LAYERS = {
    "Linear": (lambda **k: nn.Linear(4, 6, **k), (5, 4)),
    "Conv1d": (lambda **k: nn.Conv1d(4, 6, 3, stride=2, groups=2, **k), (2, 4, 9)),
    "Conv2d": (lambda **k: nn.Conv2d(4, 6, (3, 2), dilation=2, **k), (2, 4, 7, 6)),
    "Conv3d": (lambda **k: nn.Conv3d(4, 8, 2, groups=4, **k), (2, 4, 3, 4, 3)),
    "ConvTranspose1d": (lambda **k: nn.ConvTranspose1d(4, 6, 3, stride=2, **k), (2, 4, 5)),
    "ConvTranspose2d": (
        lambda **k: nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2, **k),
        (2, 4, 3, 3),
    ),
}


def by_channel(vector: torch.Tensor, like: torch.Tensor, axis: int = 1) -> torch.Tensor:
    return vector.view(-1, *[1] * (like.dim() - 1 - axis))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_before_the_normalization(kind, bias):
    make, shape = LAYERS[kind]
    layer, x = make(bias=bias, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    before = layer(x)
    s, t = torch.randn(2, before.shape[1], dtype=torch.float64)
    fold_before(layer, s, t)
    torch.testing.assert_close(layer(x), before * by_channel(s, before) + by_channel(t, before), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_after_the_normalization(kind, bias):
    make, shape = LAYERS[kind]
    layer, x = make(bias=bias, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    s, t = torch.randn(2, 4, dtype=torch.float64)
    if "Transpose" in kind:  # every position gets another share of a shift: `why_not_into` refuses it
        t = torch.zeros_like(t)
    expected = layer(x * by_channel(s, x) + by_channel(t, x))
    assert fold_after(layer, s, t) is layer
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [1, (2, 0), "same"])
@pytest.mark.parametrize("batched", [True, False])
def test_a_layer_after_that_pads_with_zeros(padding, batched):
    layer = nn.Conv2d(4, 6, 3, padding=padding, groups=2, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    x = x if batched else x[0]
    s, t = torch.randn(2, 4, dtype=torch.float64)
    s[1] = t[1] = 0  # γ = 0 without a shift: nothing to come from
    expected = layer(x * s.view(4, 1, 1) + t.view(4, 1, 1))
    folded = fold_after(layer, s, t)
    assert isinstance(folded, PaddedWith)
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_keeps_dtype_and_whether_it_is_trained_and_rounds_once(dtype):
    layer = nn.Conv1d(3, 3, 1, dtype=dtype).requires_grad_(False)
    weight = layer.weight.double()
    s, t = torch.randn(2, 3, dtype=torch.float64)
    fold_before(layer, s, t)
    assert layer.weight.dtype is layer.bias.dtype is dtype
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight, (weight * s.view(3, 1, 1)).to(dtype))
