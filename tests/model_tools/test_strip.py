"""`strip`: every batch normalization out, biases back, and the round trips with `insert`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from batchnorm import insert, strip
from batchnorm.errors import UserError

from .nets import Attention, AutoEncoder, PreActivation, Residual, Shared, TiedHead


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Residual(), torch.randn(4, 3, 8, 8)),
        (Attention(), torch.randn(3, 5, 8)),
        (AutoEncoder(), torch.randn(4, 8)),
        (Shared(), torch.randn(4, 6)),
        (TiedHead(), torch.randint(0, 11, (3, 4))),
        (nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_strip_gives_back_exactly_what_insert_was_given(model, example):
    model = model.eval()
    before = copy.deepcopy(model)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    strip(insert(model, example), example)
    assert repr(model) == repr(before)
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(p is biases[name] for name, p in model.named_parameters() if name.endswith("bias"))
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_insert_gives_back_the_normalizations_that_strip_took_out():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    original, x = copy.deepcopy(model), torch.randn(6, 3, 8, 8)
    insert(strip(model, x), x)
    assert [norm.num_features for norm in norms(model)] == [4, 5]
    torch.testing.assert_close(model(x), original(x))


def test_biases_are_drawn_as_for_a_fresh_layer_and_the_generator_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 4000, bias=False), nn.BatchNorm1d(4000), nn.ReLU(), nn.Linear(4000, 2))
    generator, last = torch.get_rng_state(), model[3].bias
    assert strip(model, torch.randn(2, 100, generator=torch.Generator().manual_seed(1))) is model
    assert torch.equal(torch.get_rng_state(), generator)
    bias = model[0].bias
    assert isinstance(bias, nn.Parameter)
    assert bias.abs().max() <= 0.1
    torch.testing.assert_close(bias.std(), torch.tensor(0.1 / 3**0.5), rtol=0.05, atol=0)
    assert model[3].bias is last
    assert isinstance(model[1], nn.Identity)


def test_layers_normalized_through_an_addition_get_their_bias_back():
    model = strip(PreActivation(), torch.randn(2, 3, 8, 8))
    assert not norms(model)
    assert model.stem.bias is not None
    assert model.conv.bias is not None


def test_what_else_our_layers_do_stays():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1, bias=False)
            self.norm = batchnorm.BatchNormAct1d(2, "leaky_relu", negative_slope=0.3)

        def forward(self, x):
            return self.norm(self.conv(x), x)

    model, x = Net(), torch.randn(3, 2, 7)
    strip(model, x)
    assert not norms(model)
    torch.testing.assert_close(model(x), F.leaky_relu(model.conv(x) + x, 0.3))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, batchnorm.BatchNorm2d])
def test_a_root_is_returned_anew(kind):
    root, x = kind(3), torch.randn(2, 3, 4, 4)
    stripped = strip(root.eval(), x)
    assert isinstance(stripped, nn.Identity)
    assert torch.equal(stripped(x), x)


class Foreign(nn.BatchNorm2d):
    def forward(self, input):
        return F.relu(super().forward(input))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3))

    def forward(self, x):
        return F.batch_norm(self.norm(self.inner(x)), self.norm.running_mean, self.norm.running_var)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), Foreign(3)), "1 is a .*Foreign"),
        (Functional(), "as a function"),
        (nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)), "does not run"),
    ],
)
def test_a_refusal_leaves_the_model_alone(model, message):
    before, keys = repr(model), list(model.state_dict())
    with pytest.raises(UserError, match=message):
        strip(model, torch.randn(2, 3, 4, 4))
    assert repr(model) == before
    assert list(model.state_dict()) == keys


def test_instance_normalization_is_not_mistaken_for_a_batch_normalization():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    strip(model, torch.randn(2, 3, 8, 8))
    assert isinstance(model[1], nn.InstanceNorm2d)
    assert model[0].bias is None
