"""FX quantization: its patterns know torch's exact classes, so a layer of ours stays a float module in the graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping, get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import batchnorm
from batchnorm.layers import say_not_quantized

from .nets import ENGINE, KINDS, QUANTIZES, images, pair

pytestmark = [
    *QUANTIZES,
    pytest.mark.filterwarnings("ignore:.*batchnorm.revert:UserWarning"),  # ours, which one test here looks at
]


def float32_pair(kind: str) -> tuple[nn.Module, nn.Module]:
    return pair(kind, torch.float32)


def batches(count: int = 4) -> list[torch.Tensor]:
    return [images(16, torch.float32) for _ in range(count)]


def quantized(model: nn.Module, calibration: list[torch.Tensor]) -> nn.Module:
    prepared = prepare_fx(copy.deepcopy(model).eval(), get_default_qconfig_mapping(ENGINE), (calibration[0],))
    for batch in calibration:
        prepared(batch)
    return convert_fx(prepared)


def trained_and_quantized(model: nn.Module, data: list[torch.Tensor]) -> tuple[nn.Module, nn.Module]:
    """(with the rounding simulated in float, with integers) after some steps of quantization-aware training."""
    prepared = prepare_qat_fx(copy.deepcopy(model).train(), get_default_qat_qconfig_mapping(ENGINE), (data[0],))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    for batch in data:
        optimizer.zero_grad()
        (prepared(batch) - batch.mean((1, 2, 3)).unsqueeze(1)).square().mean().backward()
        optimizer.step()
    prepared.eval()
    return prepared, convert_fx(copy.deepcopy(prepared))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).square().mean() / expected.var()).sqrt().item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_after_training(kind):
    theirs, ours = float32_pair(kind)
    data = batches()
    model = quantized(ours, data)
    expected = theirs.eval()(data[0])
    found = model(data[0])
    assert relative_error(quantized(theirs, data)(data[0]), expected) < 0.1
    assert relative_error(found, expected) < 0.2  # more roundings: nothing was folded
    assert torch.equal(model(data[0][:1]), found[:1])  # no statistics of the batch


class Unknown2d(nn.BatchNorm2d):
    """torch's layer under another name, which fits no pattern of the quantizer's either."""


class Unknown1d(nn.BatchNorm1d):
    pass


@torch.no_grad()
def test_the_same_as_any_subclass_of_torchs():
    theirs, ours = float32_pair("convert")
    for module in theirs.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = Unknown2d if isinstance(module, nn.BatchNorm2d) else Unknown1d
            module.__module__ = "torch.nn"  # a leaf of the trace
    data = batches()
    found, expected = (quantized(model, data)(data[0]) for model in (ours, theirs))
    assert relative_error(found, expected) < 0.02  # a rounding may fall to the other side


@torch.no_grad()
def test_of_a_reverted_model_is_that_of_torchs():
    theirs, ours = float32_pair("convert")
    data = batches()
    found, expected = (quantized(model, data)(data[0]) for model in (batchnorm.revert(ours), theirs))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_quantization_aware_training(kind):
    """Norms of ours train (their buffers move) and normalize by the running statistics once converted."""
    theirs, ours = float32_pair(kind)
    data = batches()
    before = {name: buffer.clone() for name, buffer in ours.named_buffers() if name.endswith("num_batches_tracked")}
    for model, fewest in ((ours, 1), (theirs, 0)):
        simulated, integers = trained_and_quantized(model, data)
        x = images(16, torch.float32)
        with torch.no_grad():
            found, expected = integers(x), simulated(x)
            assert relative_error(found, expected) < 0.2
            assert torch.equal(integers(x[:1]), found[:1])
        after = dict(simulated.named_buffers())
        moved = {name: (after[name] - count).item() for name, count in before.items() if name in after}
        assert set(moved.values()) <= {len(data)}
        assert len(moved) >= fewest  # torch's are inside fused modules, under other names


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_graph_trains_as_torchs_where_nothing_is_rounded(kind):
    theirs, ours = pair(kind)
    x = images()
    ours, theirs = (prepare_qat_fx(m.train(), QConfigMapping().set_global(None), (x,)) for m in (ours, theirs))
    for training in (True, True, False):  # the second and third see the buffers that the calls before left
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepare", [prepare_fx, prepare_qat_fx], ids=lambda prepare: prepare.__name__)
def test_one_line_says_that_revert_lets_it_fold(kind, prepare, caplog):
    _, ours = float32_pair(kind)
    mapping = get_default_qconfig_mapping if prepare is prepare_fx else get_default_qat_qconfig_mapping
    say_not_quantized.cache_clear()
    prepared = prepare(ours.train(prepare is prepare_qat_fx), mapping(ENGINE), (batches()[0],))
    prepared(batches()[0])
    convert_fx(prepared.eval())
    said = [record.getMessage() for record in caplog.records if record.name == "batchnorm"]
    assert len(said) == 1
    assert "batchnorm.revert" in said[0]
    assert "\n" not in said[0]
