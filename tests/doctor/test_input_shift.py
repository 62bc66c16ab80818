"""BN208: one scale and one shift of the input are named as such; channels that moved each by itself are BN202."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import diagnose, freeze
from tests.doctor.faults import data, norms, trained
from tests.doctor.nets import NETS


@pytest.fixture(scope="module")
def good():
    return {name: trained(NETS[name], 150).eval() for name in ("mlp", "cnn", "norm after activation", "residual")}


@pytest.mark.parametrize("name", ["mlp", "cnn", "norm after activation", "residual"])
@pytest.mark.parametrize(("scale", "shift"), [(5.0, 3.0), (255.0, 0.0), (0.2, 0.5)])
def test_the_two_numbers(good, name, scale, shift):
    if (name, scale) == ("norm after activation", 0.2):
        pytest.skip("the activation before the layer cuts whole channels off, so that nothing of them is left to see")
    batches = [(scale * x + shift, y) for x, y in data(NETS[name])]
    diagnosis = diagnose(copy.deepcopy(good[name]), batches)
    (found,) = (f for f in diagnosis.findings if f.code == "BN208")
    assert found.evidence["input_scale"] == pytest.approx(scale, rel=0.15)
    assert found.evidence["input_shift"] == pytest.approx(shift, abs=0.15 * scale)
    assert diagnosis.findings[0] is found or diagnosis.findings[0].severity != "info"
    assert "BN202" not in diagnosis.codes  # "recalibrate" would hide it
    assert "recalibrate(" not in found.fix


@pytest.mark.parametrize("frozen", [False, True])
def test_the_weights_do_not_matter_for_its_cost(good, frozen):
    model = copy.deepcopy(good["cnn"])
    batches = [(5 * x + 3, y) for x, y in data(NETS["cnn"])]
    diagnosis = diagnose(freeze(model) if frozen else model, batches)
    assert [(f.code, f.severity) for f in diagnosis.findings if f.severity != "info"] == [("BN208", "error")]
    assert diagnosis.exit_code == 1


def test_channels_that_moved_each_by_itself(good):
    model = copy.deepcopy(good["cnn"])
    norms(model)[0].running_mean += 20 * torch.randn(16, generator=torch.Generator().manual_seed(3))
    assert diagnose(model, data(NETS["cnn"])).codes >= {"BN202"}
    assert "BN208" not in diagnose(model, data(NETS["cnn"])).codes


def test_every_layer_moved(good):
    model = copy.deepcopy(good["cnn"])
    for layer in norms(model):
        layer.running_var *= 8
    assert "BN208" not in diagnose(model, data(NETS["cnn"])).codes


def test_the_input_does_not_reach_the_first_layer_as_numbers():
    model = nn.Sequential(nn.Embedding(10, 16), nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    for _ in range(60):
        model(torch.randint(10, (32, 4)))
    model[2].running_mean += 5
    batches = [(torch.randint(10, (32, 4)), torch.randint(3, (32,))) for _ in range(32)]
    assert "BN208" not in diagnose(model.eval(), batches).codes
