"""Inductor's own folding of convolution and normalization, which looks for torch's operator."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

import batchnorm

from .nets import stir

pytestmark = [
    pytest.mark.slow,  # C++ is compiled
    pytest.mark.filterwarnings("ignore"),  # Inductor's own
]
SETTINGS = ["freezing", "efficient_conv_bn_eval_fx_passes"]


def network() -> nn.Module:
    return stir(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))


@torch.no_grad()
def compiled(model: nn.Module, x: torch.Tensor, setting: str) -> tuple[torch.Tensor, int, str]:
    """The output, how often the pass on the fly matched, and the code that was generated."""
    torch._dynamo.reset()
    counters.clear()
    with config.patch({setting: True, "fx_graph_cache": False}):
        out, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
    return out, counters["inductor"]["efficient_conv_bn_eval"], "\n".join(code)


def layers_of_ours(theirs: nn.Module, how: str) -> nn.Module:
    model = batchnorm.convert(copy.deepcopy(theirs))
    if how == "frozen":
        return batchnorm.freeze(model).train()
    return batchnorm.revert(model) if how == "reverted" else model


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", ["converted", "frozen", "reverted"])
def test_folded_as_torchs(setting, how):
    """In eval and in frozen mode Inductor finds torch's operator."""
    theirs, x = network().eval(), torch.randn(2, 3, 6, 6)
    found, expected = (compiled(model, x, setting) for model in (layers_of_ours(theirs, how), theirs))
    assert found[1] == expected[1] == (0 if setting == "freezing" else 2)
    assert ("sqrt" in found[2]) == ("sqrt" in expected[2]) == (setting != "freezing")  # folded before the code is made
    assert "torch.ops.batchnorm" not in found[2]
    torch.testing.assert_close(found[0], theirs(x).detach(), rtol=1e-4, atol=1e-4)
