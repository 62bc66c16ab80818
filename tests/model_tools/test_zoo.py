"""The tools on networks that other people wrote: converted, reverted, folded and fused, each against the original."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from batchnorm.model_tools import convert, fold, revert
from batchnorm.model_tools.fuse import fuse_graph

from .zoo import ZOO, build, classify

# Batch normalizations that no layer's result reaches alone, by network.
STAYS = {"swiftformer": ["norm"]}


def steps(model: Any, parameters_of: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, gradients, parameters and buffers over three optimizer steps on batches of two sizes."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(parameters_of.parameters(), lr=0.01, momentum=0.9)
    left: list[torch.Tensor] = []
    for size in (4, 3, 4):
        optimizer.zero_grad()
        y = classify(model, x[:size])
        y.backward(torch.randn(y.shape, generator=generator, dtype=y.dtype))
        left += [y.detach(), *(p.grad.clone() for p in parameters_of.parameters() if p.grad is not None)]
        optimizer.step()
    return left + [value.clone() for value in parameters_of.state_dict().values()]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().item() or 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * max(scale, 1e-3))


@pytest.mark.parametrize("name", ZOO)
def test_converted_trains_as_the_original_and_reverts_to_it(name):
    original, x = build(name)
    model = convert(copy.deepcopy(original))
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert all(isinstance(m, (batchnorm.BatchNorm1d, batchnorm.BatchNorm2d)) for m in norms)
    expected = steps(original, original, x)
    assert_close(steps(model, model, x), expected)
    revert(model)
    assert repr(model) == repr(original)
    # Three steps of a deep network on four samples amplify rounding; a mistake would be of the size of the logits.
    wanted = classify(original.eval(), x)
    torch.testing.assert_close(classify(model.eval(), x), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ZOO)
def test_folded_is_the_original_in_eval(name):
    model, x = build(name)
    folded, report = fold(model.eval(), {"pixel_values": x})
    assert [entry.norm.rpartition(".")[2] for entry in report.stayed] == STAYS.get(name, []), report
    other = torch.randn_like(x[:3])
    expected = classify(model, other)
    assert expected.std(0).max() > 1e-5  # else equality would show nothing
    torch.testing.assert_close(classify(folded, other), expected, rtol=1e-9, atol=1e-11)


# Compiling is most of the time: the default run compiles two of them.
COMPILED = [name if name in ("resnet", "regnet") else pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("training", [True, False])
def test_fused_is_eager(name, training):
    original, x = build(name)
    model, counts = copy.deepcopy(original), []

    def backend(gm, example_inputs):
        counts.append(fuse_graph(gm))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    if training:
        assert_close(steps(compiled, model, x), steps(original, original, x))
        assert sum(counts) >= norms
    else:
        model.eval()
        torch.testing.assert_close(classify(compiled, x), classify(original.eval(), x), rtol=1e-9, atol=1e-11)
        assert sum(counts) == norms
