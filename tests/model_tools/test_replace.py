"""The walker: every place a module stands in, one replacement, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.errors import UserError
from batchnorm.model_tools.replace import replace


class Places(nn.Module):
    """One module registered twice, and kept in a tuple, a list and a dict beside."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.block = nn.Sequential(nn.Linear(3, 3), self.act)
        self.order = (self.block[0], self.act)
        self.listed = [self.act]
        self.named = {"act": self.act}


def to_tanh(name: str, module: nn.Module) -> nn.Module | None:
    return nn.Tanh() if isinstance(module, nn.ReLU) else None


def test_all_places_get_the_one_replacement_and_undo_puts_it_back():
    model = Places()
    act, order = model.act, model.order
    done = replace(model, to_tanh)
    assert done.root is model
    new = done.modules[act]
    assert isinstance(new, nn.Tanh)
    assert all(place is new for place in (model.act, model.block[1], model.order[1], model.listed[0]))
    assert model.named == {"act": new}
    done.undo()
    assert all(place is act for place in (model.act, model.block[1], model.listed[0], model.named["act"]))
    assert model.order is order


def test_a_root_is_returned_anew():
    root = nn.ReLU()
    assert isinstance(replace(root, to_tanh).root, nn.Tanh)


def test_the_policy_is_asked_once_a_module_and_not_inside_replacements():
    asked = []

    def policy(name: str, module: nn.Module) -> nn.Module | None:
        asked.append(name)
        return nn.Identity() if name == "block" else None

    replace(Places(), policy)
    assert asked == ["", "act", "block"]


def test_a_policy_that_raises_leaves_the_model_alone():
    model = Places()
    before = list(model.modules())

    def policy(name: str, module: nn.Module) -> nn.Module | None:
        if name == "block.0":
            raise RuntimeError("no")
        return nn.Tanh() if isinstance(module, nn.ReLU) else None

    with pytest.raises(RuntimeError):
        replace(model, policy)
    assert list(model.modules()) == before


def test_torchscript_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match="TorchScript"):
        replace(nn.Sequential(scripted), lambda name, module: nn.Tanh() if name == "0.0" else None)
