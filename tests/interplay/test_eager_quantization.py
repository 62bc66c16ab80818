"""Eager-mode quantization, whose tables know torch's exact classes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization

import batchnorm

from .nets import ENGINE, KINDS, QUANTIZES, images, pair, stir

pytestmark = QUANTIZES


def network() -> nn.Module:
    return stir(
        nn.Sequential(
            quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4), quantization.DeQuantStub(),
        )
    ).eval()  # fmt: skip


def quantized(model: nn.Module, data: torch.Tensor, groups: list[list[str]]) -> nn.Module:
    model = quantization.fuse_modules(copy.deepcopy(model), groups) if groups else copy.deepcopy(model)
    model.qconfig = quantization.get_default_qconfig(ENGINE)
    prepared = quantization.prepare(model)
    prepared(data)
    return quantization.convert(prepared)


@torch.no_grad()
def test_after_fusing():
    theirs, data = network(), images(16, torch.float32)
    ours = batchnorm.convert(copy.deepcopy(theirs))
    groups = [["1", "2", "3"], ["4", "5"]]
    found, expected = (quantized(model, data, groups) for model in (ours, theirs))
    assert [type(m) for m in found] == [type(m) for m in expected]
    torch.testing.assert_close(found(data), expected(data), rtol=0, atol=2e-2)  # a rounding may fall otherwise


@torch.no_grad()
@pytest.mark.parametrize("groups", [[], [["1", "2", "3"]]], ids=["none fused", "one fused"])
def test_a_norm_that_was_not_fused(groups):
    """torch's becomes a norm of integers. Ours does too, or one line says that `revert` lets it."""
    theirs, data = network(), images(16, torch.float32)
    ours = batchnorm.convert(copy.deepcopy(theirs))
    expected = quantized(theirs, data, groups)(data)
    found, refusal = None, ""
    try:
        found = quantized(ours, data, groups)(data)
    except (ValueError, NotImplementedError) as refused:
        refusal = str(refused)
    if found is None:
        assert "batchnorm.revert" in refusal
        assert "\n" not in refusal
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    found = quantized(batchnorm.revert(ours), data, groups)(data)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_dynamic(kind):
    """Linear layers alone are replaced; the norms beside them go on."""
    theirs, ours = pair(kind, torch.float32)
    x = images(dtype=torch.float32)
    found, expected = (quantization.quantize_dynamic(m.eval(), {nn.Linear}, torch.qint8)(x) for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
