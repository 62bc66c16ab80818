"""Converters between BatchNorm and SyncBatchNorm, which go by the type.

SyncBatchNorm trains on GPUs alone: here it is built, and run in eval.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm

from .nets import KINDS, Small, assert_same_calls, images, pair

NORMS = 4


def eval_outputs(*models: nn.Module) -> list[torch.Tensor]:
    x = images()
    with torch.no_grad():
        return [model.eval()(x) for model in models]


def assert_sync(model: nn.Module, theirs: nn.Module) -> None:
    """As many SyncBatchNorms as torch's network has, at the same places, and the same function in eval."""
    found = {name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert len(found) == NORMS
    assert found == {name for name, m in theirs.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert not any(isinstance(m, batchnorm.BatchNorm2d) for m in model.modules())
    ours, expected = eval_outputs(model, theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_torchs(kind):
    theirs, ours = pair(kind)
    before = dict(ours.named_parameters())
    assert_sync(*(nn.SyncBatchNorm.convert_sync_batchnorm(model) for model in (ours, theirs)))
    assert all(parameter is before[name] for name, parameter in ours.named_parameters())


def test_torchs_keeps_the_mode_and_the_settings():
    _, ours = pair("convert")
    ours.eval()
    norms = {name: m for name, m in ours.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    for name, norm in norms.items():
        new = ours.get_submodule(name)
        assert (new.eps, new.momentum, new.training) == (norm.eps, norm.momentum, False)


def test_a_root():
    """A norm that is the whole model is returned anew."""
    new = nn.SyncBatchNorm.convert_sync_batchnorm(batchnorm.BatchNorm2d(3))
    assert type(new) is nn.SyncBatchNorm


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_by_convert(kind):
    """A model that torch made synchronized is one of ours again after `convert`, and torch's after `revert`."""
    theirs, ours = pair(kind)
    nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    batchnorm.convert(ours)
    assert sum(getattr(m, "process_group", None) == "world" for m in ours.modules()) == NORMS
    assert_same_calls(ours, theirs)
    batchnorm.revert(ours)
    assert sum(type(m) is nn.SyncBatchNorm for m in ours.modules()) == NORMS


@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_plugin(kind):
    layer_sync = pytest.importorskip("lightning.pytorch.plugins.layer_sync")
    plugin = layer_sync.TorchSyncBatchNorm()
    theirs, ours = pair(kind)
    original = copy.deepcopy(theirs)
    ours, theirs = plugin.apply(ours), plugin.apply(theirs)
    assert_sync(ours, theirs)
    ours, theirs = plugin.revert(ours), plugin.revert(theirs)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in ours.modules())
    assert_same_calls(ours, original)


@pytest.mark.parametrize("kind", KINDS)
def test_mmengines(kind):
    utils = pytest.importorskip("mmengine.model.utils")
    theirs, ours = pair(kind)
    assert_sync(*(utils.convert_sync_batchnorm(model) for model in (ours, theirs)))
    ours, theirs = (utils.revert_sync_batchnorm(model) for model in (ours, theirs))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in ours.modules())
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("name", ["torch", "mmengine"])
def test_what_a_converter_leaves_of_a_fused_sequential_runs_without_us(name):
    """The pair's Sequential still has its call, finds no layer of ours in it, and goes on one by one."""
    theirs, ours = pair("convert")
    if name == "torch":
        nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    else:
        ours = pytest.importorskip("mmengine.model.utils").convert_sync_batchnorm(ours)
    stem, expected = eval_outputs(ours.stem, theirs.stem)
    torch.testing.assert_close(stem, expected)
    batchnorm.revert(ours)
    assert type(ours.stem) is nn.Sequential
    assert [type(m) for m in ours.stem] == [nn.Conv2d, nn.SyncBatchNorm, nn.ReLU]


def test_our_process_group_is_lost_at_torchs_converter_as_any_other():
    """torch's converter takes the group as its own argument, and does not ask what a layer had."""
    model = batchnorm.convert(Small(), process_group="world")
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {nn.SyncBatchNorm}
    assert {m.process_group for m in model.modules() if isinstance(m, nn.SyncBatchNorm)} == {None}
