"""Lazy layers: refused in one line that names the layer while they have no size, and taken once they have."""

import pytest
import torch
from torch import nn

from batchnorm import UserError, fold, freeze, recalibrate, strip

X = torch.randn(8, 3, 5, 5)


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.LazyBatchNorm2d()), nn.BatchNorm2d(4))


TOOLS = {
    "freeze": freeze,
    "recalibrate": lambda model: recalibrate(model, [X]),
    "fold": lambda model: fold(model.eval(), (X,)),
    "strip": lambda model: strip(model, X),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_layer_without_a_size_is_named_and_nothing_changed(tool):
    model = net()
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=rf"^{tool}: 1\.0 is a LazyBatchNorm2d .*run the model once") as caught:
        TOOLS[tool](model)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == before
    assert model[2].weight.requires_grad


@pytest.mark.parametrize("tool", TOOLS)
def test_a_layer_that_a_checkpoint_has_filled_is_taken(tool):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())
    model.load_state_dict(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict())
    model(X)
    TOOLS[tool](model)
