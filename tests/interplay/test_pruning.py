"""Tools that put something else in a parameter's place, or cut channels out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from .nets import KINDS, assert_same, assert_same_calls, images, left_by, pair

NORMS = ["stem.1", "block.1.norm", "norm", "head.2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NORMS)
def test_a_pruned_weight(kind, name):
    """`weight` is an attribute then, made anew by a hook before each call."""
    theirs, ours = pair(kind)
    for model in (ours, theirs):
        prune.l1_unstructured(model.get_submodule(name), "weight", amount=2)
    assert (ours.get_submodule(name).weight == 0).sum() == 2
    assert_same_calls(ours, theirs, modes=(True, False, True))
    for model in (ours, theirs):
        prune.remove(model.get_submodule(name), "weight")
    assert_same_calls(ours, theirs, modes=(True, False, True))


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_weights_train(kind):
    """The mask is applied to what the optimizer made of the weight, not to what it was at the pruning."""
    theirs, ours = pair(kind)
    x = images()
    for model in (ours, theirs):
        prune.random_unstructured(model.stem[1], "weight", amount=1)
        model.stem[1].weight_mask.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            left_by(model, x, seed)
            optimizer.step()
    assert_same(left_by(ours, x), left_by(theirs, x))
    assert (ours.stem[1].weight == 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_global_pruning(kind):
    theirs, ours = pair(kind)
    for model in (ours, theirs):
        chosen = [(m, "weight") for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(chosen) == len(NORMS)
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=5)
    assert_same_calls(ours, theirs)


class Positive(nn.Module):
    def forward(self, weight):
        return nn.functional.softplus(weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NORMS)
def test_a_parametrized_weight(kind, name):
    theirs, ours = pair(kind)
    for model in (ours, theirs):
        parametrize.register_parametrization(model.get_submodule(name), "weight", Positive())
    assert_same_calls(ours, theirs, modes=(True, False, True))
    for model in (ours, theirs):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_spectral_norm_beside(kind):
    """On the convolutions and linear layers around."""
    theirs, ours = pair(kind)
    for model in (ours, theirs):
        for module in list(model.modules()):
            if type(module) in (nn.Conv2d, nn.Linear):
                torch.manual_seed(1)
                parametrizations.spectral_norm(module)
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_torch_pruning(kind, training):
    """Channels are cut at the same places as in torch's network: its graph follows our layers' gradients."""
    tp = pytest.importorskip("torch_pruning")
    theirs, ours = (model.train(training) for model in pair(kind))
    for model in (ours, theirs):
        before = copy.deepcopy(model.state_dict())
        importance = tp.importance.MagnitudeImportance(p=2)
        pruner = tp.pruner.MagnitudePruner(
            model, images(2), importance=importance, pruning_ratio=0.5, ignored_layers=[model.head[4]]
        )
        model.load_state_dict(before)  # its trace of a training model moved the buffers
        pruner.step()
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.stem[1].num_features == 2
    assert ours.stem[1].weight.shape == ours.stem[1].running_mean.shape == (2,)
    assert_same_calls(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_prunings_bn_scale_importance(kind):
    """Its importance by γ asks isinstance."""
    tp = pytest.importorskip("torch_pruning")
    theirs, ours = (model.eval() for model in pair(kind))
    for model in (ours, theirs):
        pruner = tp.pruner.BNScalePruner(
            model, images(2), importance=tp.importance.BNScaleImportance(), pruning_ratio=0.5,
            ignored_layers=[model.head[4]],
        )  # fmt: skip
        pruner.step()
    assert_same_calls(ours, theirs)
