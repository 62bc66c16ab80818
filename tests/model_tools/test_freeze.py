"""`freeze` and `unfreeze`: nothing of a batch normalization moves, and everything comes back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import batchnorm
from batchnorm.errors import UserError
from batchnorm.model_tools import convert, freeze, unfreeze

from .nets import Unregistered, scripted


class Foreign(nn.BatchNorm1d):
    """Another library's: its own forward and its own attribute."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.scale = 2.0

    def forward(self, input):
        return self.scale * super().forward(input)


def net(kind: type = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), kind(6), nn.ReLU(), nn.Linear(6, 2))


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    y = model(torch.randn(8, 4))
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()


KINDS = [nn.BatchNorm1d, batchnorm.BatchNorm1d, Foreign]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves_through_train_and_optimizer_steps(kind):
    model = net(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train_a_step(model, optimizer)  # momentum and gradients that could still move γ
    assert freeze(model) is model
    before = {key: value.clone() for key, value in model[1].state_dict().items()}
    x = torch.randn(8, 4)
    expected = model.eval()(x)
    model.train()
    torch.testing.assert_close(model(x), expected)
    linear = model[0].weight.clone()
    for _ in range(3):
        train_a_step(model, optimizer)
        model.train()
    assert not model[1].training
    assert isinstance(model[1], kind)
    assert not torch.equal(model[0].weight, linear)
    assert all(torch.equal(model[1].state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [True, False])
def test_unfreeze_restores_everything(kind, mode):
    model = net(kind)
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_a_step(model, optimizer)
    grad = model[1].weight.grad
    freeze(freeze(model))
    model.train(mode)
    assert unfreeze(model) is model
    assert type(model[1]) is kind
    assert model[1].training is mode
    assert model[1].weight.requires_grad
    assert not model[1].bias.requires_grad
    assert model[1].weight.grad is grad
    assert vars(model[1]).keys() == vars(net(kind)[1]).keys()
    model.train()
    train_a_step(model, optimizer)
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_frozen_and_can_be_unfrozen(kind, duplicate):
    model = freeze(net(kind))
    other = duplicate(model)
    x = torch.randn(8, 4)
    torch.testing.assert_close(other.train()(x), model(x))
    assert type(other[1]) is type(model[1])
    assert type(unfreeze(other)[1]) is kind
    assert not model[1].training


def test_a_root_and_a_shared_layer():
    root = freeze(nn.BatchNorm1d(3).train())
    root.train()(torch.randn(4, 3))
    assert root.num_batches_tracked == 0
    shared = nn.BatchNorm1d(4)
    model = freeze(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert type(unfreeze(model)[0]) is nn.BatchNorm1d


def test_a_frozen_layer_passes_the_gradient_of_fixed_statistics():
    layer = freeze(batchnorm.BatchNorm1d(3, dtype=torch.float64))
    layer.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 3, dtype=torch.float64)
    layer.train()(x).backward(grad)
    torch.testing.assert_close(x.grad, grad / (layer.running_var + layer.eps).sqrt())


def test_a_layer_without_statistics_is_refused_and_nothing_is_frozen():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(UserError, match="1 keeps no running statistics"):
        freeze(model)
    assert all(type(m) is nn.BatchNorm1d for m in model)
    assert all(m.weight.requires_grad for m in model)


def test_a_converted_frozen_layer_stays_frozen():
    model = convert(freeze(net()))
    model.train()
    assert isinstance(model[1], batchnorm.BatchNorm1d)
    assert not model[1].training
    unfreeze(model)
    assert type(model[1]) is batchnorm.BatchNorm1d
    assert [m.training for m in model.modules() if isinstance(m, _BatchNorm)] == [True]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_what_a_parametrized_weight_is_computed_from_is_held_too():
    model = net()
    parametrize.register_parametrization(model[1], "weight", Doubled())
    original = model[1].parametrizations.weight.original
    original.grad = torch.ones_like(original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    freeze(model)
    before = original.detach().clone()
    assert not original.requires_grad
    for _ in range(2):
        train_a_step(model, optimizer)
    torch.testing.assert_close(original.detach(), before, rtol=0, atol=0)
    unfreeze(model)
    assert original.requires_grad
    assert torch.equal(original.grad, torch.ones_like(original))


def test_what_cannot_be_held_is_named():
    model = nn.Sequential(Unregistered(), scripted(nn.BatchNorm1d(4)), nn.BatchNorm1d(4))
    reasons = r"left alone: 1 \(a TorchScript module\), 0.held.1 \(not registered as a submodule\)"
    with pytest.warns(UserWarning, match=reasons):
        freeze(model)
    assert not model.train()[2].training
    teacher = nn.Sequential(nn.BatchNorm1d(4))
    model[2].teacher = [teacher, model]  # of what is held, what the model registers too is no news
    with pytest.warns(UserWarning, match=r"held.1 .*, 2.teacher.0 \(not registered") as caught:
        freeze(model)
    assert str(caught[0].message).count("(") == 3


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_a_layer_that_lacks_one_of_its_statistics_is_refused(missing):
    model = net()
    setattr(model[1], missing, None)
    with pytest.raises(UserError, match="1 keeps no running statistics"):
        freeze(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
def test_counters_of_any_dtype_are_held_and_go_on(kind, dtype):
    model = net(kind)
    model[1].num_batches_tracked = torch.ones((), dtype=dtype)
    freeze(model).train()(torch.randn(8, 4))
    assert model[1].num_batches_tracked == 1
    unfreeze(model)(torch.randn(8, 4))
    assert model[1].num_batches_tracked == 2
    assert model[1].num_batches_tracked.dtype is dtype
