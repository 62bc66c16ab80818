"""timm's own layers: BatchNorm2d subclasses that activate, its converters, and whole networks of them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.model_tools.foreign_act import ForeignNormAct

from .nets import assert_same, left_by, stir
from .stubs import import_timm


@pytest.fixture(scope="module")
def timm():
    module = import_timm()
    yield module
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def layers(timm):
    import timm.layers

    return timm.layers


def drop_block() -> nn.Module:
    from timm.layers import DropBlock2d

    return DropBlock2d(drop_prob=0.3, block_size=2)


def x2d() -> torch.Tensor:
    return torch.randn(6, 4, 6, 6, dtype=torch.float64)


def norm_act_pair(layers, **keywords) -> tuple[nn.Module, nn.Module]:
    theirs = stir(nn.Sequential(nn.Conv2d(4, 4, 1), layers.BatchNormAct2d(4, **keywords), nn.Conv2d(4, 2, 1))).double()
    return theirs, batchnorm.convert(copy.deepcopy(theirs))


def assert_same_seeded(ours: nn.Module, theirs: nn.Module, modes=(True, False)) -> None:
    """As `assert_same_calls`, with the same random numbers for what drops."""
    for training in modes:
        x, left = x2d(), []
        for model in (ours, theirs):
            torch.manual_seed(5)
            left.append(left_by(model.train(training), x))
        assert_same(*left)


ACTIVATIONS = ["relu", "relu6", "leaky_relu", "silu", "hard_swish", "sigmoid", "tanh", "gelu", "hard_sigmoid", "mish"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(layers, activation):
    theirs, ours = norm_act_pair(layers, act_layer=activation)
    assert isinstance(ours[1], ForeignNormAct)
    assert_same_seeded(ours, theirs)


@pytest.mark.parametrize("drop", [drop_block, lambda: nn.Dropout(0.4), lambda: nn.Dropout2d(0.4)])
def test_what_drops(layers, drop):
    theirs, ours = norm_act_pair(layers, drop_layer=drop)
    assert type(ours[1].drop) is type(theirs[1].drop)
    assert_same_seeded(ours, theirs)


def test_without_an_activation(layers):
    assert_same_seeded(*reversed(norm_act_pair(layers, apply_act=False)))


def test_type_keys_and_parts_stay(layers):
    theirs, ours = norm_act_pair(layers)
    assert isinstance(ours[1], layers.BatchNormAct2d)
    assert isinstance(ours[1], batchnorm.layers.BatchNormBase)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    ours.load_state_dict(theirs.state_dict())


def test_revert_gives_timms_type_back(layers):
    theirs, ours = norm_act_pair(layers, drop_layer=drop_block)
    parameters = list(ours.parameters())
    batchnorm.revert(ours)
    assert type(ours[1]) is layers.BatchNormAct2d
    assert vars(ours[1]).keys() == vars(theirs[1]).keys()
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert repr(ours) == repr(theirs)
    assert_same_seeded(ours, theirs)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(layers, change):
    theirs, ours = norm_act_pair(layers)
    other = change(ours)
    assert isinstance(other[1], layers.BatchNormAct2d)
    assert type(batchnorm.revert(change(other))[1]) is layers.BatchNormAct2d
    assert_same_seeded(other, theirs)


@pytest.mark.parametrize("part", ["", "act", "drop"])
def test_hooks(layers, part):
    """On the layer, or on what is in it: they see what timm's own see, also in the backward."""
    logs = []
    for model in norm_act_pair(layers, act_layer="silu", inplace=False):  # in place, torch refuses backward hooks
        seen, module = [], model[1].get_submodule(part)
        module.register_forward_pre_hook(lambda m, args, s=seen: s.append(args[0].clone()))
        module.register_forward_hook(lambda m, args, out, s=seen: s.append(out.clone()))
        module.register_full_backward_hook(lambda m, gin, gout, s=seen: s.extend((gin[0], gout[0])))
        torch.manual_seed(3)
        left_by(model.train(), x2d())
        logs.append(seen)
    assert len(logs[0]) == 4
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-10, atol=1e-10)


def test_an_activation_in_anothers_place(layers):
    theirs, ours = norm_act_pair(layers)
    for model in (ours, theirs):
        model[1].act = nn.GELU()
    assert_same_seeded(ours, theirs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(layers, backend):
    torch._dynamo.reset()
    theirs, ours = norm_act_pair(layers, act_layer="silu")
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for training in (True, False, True):
        ours.train(training)
        theirs.train(training)
        x = x2d()
        y, expected = compiled(x), theirs(x)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        g = torch.randn_like(y)
        for model, out in ((ours, y), (theirs, expected)):
            model.zero_grad()
            out.backward(g)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_timms_sync_converter(layers):
    """It asks isinstance, so the activation comes along."""
    theirs, ours = (layers.convert_sync_batchnorm(model) for model in norm_act_pair(layers, act_layer="silu"))
    assert type(ours[1]) is type(theirs[1])
    assert type(ours[1]).__name__ == "SyncBatchNormAct"
    x = x2d()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-10)
    converted = batchnorm.convert(copy.deepcopy(theirs))
    torch.testing.assert_close(converted.eval()(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert type(batchnorm.revert(converted)[1]) is type(theirs[1])


def test_timms_freezing(layers):
    """`freeze_batch_norm_2d` makes layers of its own type, with the activation, and `unfreeze` timm's."""
    theirs, ours = norm_act_pair(layers, act_layer="silu")
    ours, frozen = (layers.freeze_batch_norm_2d(model) for model in (ours, copy.deepcopy(theirs)))
    assert type(ours[1]) is layers.FrozenBatchNormAct2d
    x = x2d()
    torch.testing.assert_close(ours.train()(x), frozen.train()(x), rtol=1e-10, atol=1e-10)
    ours = layers.unfreeze_batch_norm_2d(ours)
    assert type(ours[1]) is layers.BatchNormAct2d
    theirs.eval()
    torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_convert_of_timms_frozen_layer(layers):
    """It activates too: it is left alone and named, or computes the same."""
    theirs = layers.freeze_batch_norm_2d(norm_act_pair(layers, act_layer="silu")[0])
    ours = copy.deepcopy(theirs)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        batchnorm.convert(ours)
    if type(ours[1]) is layers.FrozenBatchNormAct2d:
        assert "left alone: 1" in str(seen[0].message)
    x = x2d()
    torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-10, atol=1e-10)


NETWORKS = ["efficientnet_lite0", "mobilenetv2_050", "densenet121", "resnet18", "regnetx_002", "mobilenetv3_small_050"]
QUICK = {"resnet18", "mobilenetv3_small_050"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_networks(timm, name):
    """Outputs, gradients and buffers of two steps of training, and of evaluation; every norm is one of ours."""
    theirs = stir_gently(timm.create_model(name, pretrained=False, num_classes=3).double())
    ours = batchnorm.convert(copy.deepcopy(theirs))
    norms = [m for m in ours.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, batchnorm.layers.BatchNormBase) for m in norms)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for training in (True, True, False):
        x, left = torch.randn(3, 3, 64, 64, dtype=torch.float64), []
        for model in (ours, theirs):
            torch.manual_seed(7)
            left.append(left_by(model.train(training), x))
        assert_same(*left, tolerance=1e-8)  # fifty layers of rounding
    batchnorm.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]


def stir_gently(model: nn.Module) -> nn.Module:
    """Statistics near those of the data, so that fifty layers neither vanish nor explode in eval."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(std=0.1)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64, dtype=torch.float64))
    return model
