"""Optimizer groups, the |γ| ranking, and statistics for averaged models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import UserError
from batchnorm.model_tools import copy_statistics, importance, param_groups

from .nets import PreActivation, Shared


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), LlamaRMSNorm()])
        self.lstm = nn.LSTM(4, 3)
        self.vector = nn.Parameter(torch.ones(4))
        self.tied = self.linear


def test_gamma_beta_and_biases_do_not_decay_and_each_parameter_stands_once():
    model = Mixed()
    model.norms[0].weight.requires_grad_(False)
    decayed, still = param_groups(model, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    expected = ["vector", "linear.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert [names[p] for p in decayed["params"]] == expected
    assert {names[p] for p in still["params"]} == set(names.values()) - set(expected)
    torch.optim.SGD(param_groups(model, 0.1), lr=0.1)


@pytest.mark.parametrize("weight_decay", [-1.0, float("nan"), float("inf")])
def test_an_impossible_weight_decay_is_refused(weight_decay):
    with pytest.raises(UserError, match="weight_decay"):
        param_groups(nn.Linear(2, 2), weight_decay)


def test_channels_are_ranked_by_the_size_of_gamma():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2, affine=False), batchnorm.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-3.0, 0.5, 0.25]))
        model[2].weight.copy_(torch.tensor([-0.125, 0.1]))
    found = importance(model)
    assert list(found.scores) == ["0", "2"]
    assert [(name, channel) for name, channel, _ in found.ranking()] == [
        ("2", 1), ("2", 0), ("0", 2), ("0", 1), ("0", 0),
    ]  # fmt: skip
    assert found.ranking()[-1][2] == 3.0
    assert found.least(0.6) == {"0": [2], "2": [1]}  # one channel of each layer is always kept
    assert found.least(0.0) == {"0": [], "2": []}
    found.scores["0"].zero_()
    assert model[0].weight[0] == -3
    with pytest.raises(UserError, match="share"):
        found.least(1.5)


def test_statistics_are_copied_into_an_average():
    model = PreActivation()
    average = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(4, 3, 8, 8))
    assert copy_statistics(model, average) == ["norm", "last_norm"]
    assert torch.equal(average.module.norm.running_var, model.norm.running_var)
    assert average.module.norm.num_batches_tracked == 1
    assert average.module.norm.running_var is not model.norm.running_var


@pytest.mark.parametrize(("other", "message"), [(Shared(), "only one"), (nn.BatchNorm1d(3), "shape")])
def test_models_that_do_not_match_are_refused(other, message):
    source = nn.BatchNorm1d(4) if message == "shape" else PreActivation()
    before = [b.clone() for b in other.buffers()]
    with pytest.raises(UserError, match=message):
        copy_statistics(source, other)
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), before, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.complex64, torch.int64), (torch.float16, torch.int32), (torch.int64,) * 2])
def test_counters_of_any_dtype_are_copied(dtypes):
    source, target = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    for model, dtype, count in zip((source, target), dtypes, (7, 1), strict=True):
        model[0].num_batches_tracked = torch.tensor(count, dtype=dtype)
    copy_statistics(source, target)
    assert target[0].num_batches_tracked == 7
    assert target[0].num_batches_tracked.dtype is dtypes[1]
