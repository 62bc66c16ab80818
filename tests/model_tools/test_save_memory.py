"""`convert(save_memory=True)`: which layers have it, and that it comes and goes without a trace."""

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import BatchNorm2d, BatchNormAct2d, convert, revert


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.LazyBatchNorm2d()),
        BatchNormAct2d(4, "silu"),
    )  # fmt: skip


def saving(model):
    return [m.save_memory for m in model.modules() if isinstance(m, BatchNorm2d)]


def test_every_layer_of_ours_has_it_and_loses_it():
    model = convert(net())
    assert saving(model) == [False] * 3
    assert saving(convert(model, save_memory=True)) == [True] * 3
    assert saving(convert(model)) == [True] * 3  # not said: as it was
    assert saving(convert(model, save_memory=False)) == [False] * 3
    convert(model, save_memory=True)(torch.randn(2, 3, 8, 8))  # a lazy layer cannot be copied
    assert saving(copy.deepcopy(model)) == [True] * 3


def test_revert_leaves_nothing_of_it():
    model = convert(net(), save_memory=True)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    for module in revert(model).modules():
        assert "save_memory" not in module.__dict__
        assert not module._forward_hooks


def test_a_layer_that_is_the_model():
    assert convert(nn.BatchNorm2d(3), save_memory=True).save_memory


def test_a_refusal_changes_nothing():
    model = net()
    with pytest.raises(ValueError, match="domains"):
        convert(model, save_memory=True, domain_affine=True)
    assert not any("save_memory" in m.__dict__ and m.save_memory for m in model.modules())


def test_the_last_layers_of_a_sequential_are_released_by_its_call():
    """No normalization comes after: the container looks at what each child saved."""
    model = convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), save_memory=True
    )
    out = model(torch.randn(2, 3, 8, 8))
    assert out.grad_fn._raw_saved_input.unpack_hook is not None
    assert (
        batchnorm.convert(model, save_memory=False)(torch.randn(2, 3, 8, 8)).grad_fn._raw_saved_input.unpack_hook
        is None
    )
