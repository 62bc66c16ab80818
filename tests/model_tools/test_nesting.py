"""Each model tool on modules in every kind of nest: containers, wrappers, a root, one module under two names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.inspect.modules import is_norm
from batchnorm.model_tools.insert import Normalized

from .test_fold import trained


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.named = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "layer": nn.Linear(4, 4)})
        self.nested = nn.Sequential(
            nn.Sequential(block(), nn.Identity()), nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
        )

    def forward(self, x: Tensor) -> Tensor:
        for module in self.listed:
            x = module(x)
        return self.nested(self.named["norm"](self.named["layer"](x.relu())))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = block()
        self.c = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x))


NETS = {
    "containers": Containers,
    "two names": TwoNames,
    "data parallel": lambda: nn.DataParallel(nn.Sequential(block(), nn.Linear(4, 4))),
    "an average": lambda: torch.optim.swa_utils.AveragedModel(nn.Sequential(block(), nn.Linear(4, 4))),
    "a wrapped root": lambda: nn.DataParallel(nn.BatchNorm1d(4)),
    "a root": lambda: nn.BatchNorm1d(4),
}
X = torch.randn(8, 4, dtype=torch.float64)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if is_norm(module)}


@pytest.mark.parametrize("kind", NETS)
def test_convert_and_revert_reach_every_place(kind):
    model = trained(NETS[kind]())
    expected, keys, names = model(X), list(model.state_dict()), list(norms(model))
    for tool, module in ((batchnorm.convert, "batchnorm"), (batchnorm.revert, "torch")):
        model = tool(model)
        torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
        assert list(model.state_dict()) == keys
        assert list(norms(model)) == names
        assert all(type(norm).__module__.startswith(module) for norm in norms(model).values())


@pytest.mark.parametrize("kind", NETS)
def test_freeze_holds_every_layer(kind):
    model = trained(NETS[kind]())
    before = copy.deepcopy(model.state_dict())
    batchnorm.freeze(model).train()(X)
    assert not any(norm.training for norm in norms(model).values())
    batchnorm.unfreeze(model)
    assert all(norm.training and type(norm) is nn.BatchNorm1d for norm in norms(model).values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "norm" in key)


@pytest.mark.parametrize("kind", NETS)
def test_fold_recalibrate_and_the_readers(kind):
    model = trained(NETS[kind]())
    folded, report = batchnorm.fold(model, (X,))
    torch.testing.assert_close(folded(-X), model(-X), rtol=1e-10, atol=1e-10)
    assert len(report.folded) == (0 if "root" in kind else len({id(norm) for norm in norms(model).values()}))
    scores = batchnorm.importance(model).scores
    assert {id(norm) for norm in norms(model).values()} == {id(dict(model.named_modules())[name]) for name in scores}
    decays, still = (group["params"] for group in batchnorm.param_groups(model, 0.1))
    assert len(decays) + len(still) == len(list(model.parameters()))
    assert {id(p) for norm in norms(model).values() for p in norm.parameters()} <= {id(p) for p in still}
    result = batchnorm.recalibrate(model, [X])
    assert result.layers.keys() == scores.keys()
    moved = model(X)
    batchnorm.recalibrate(model, X.split(3))
    torch.testing.assert_close(model(X), moved)


@pytest.mark.parametrize("kind", NETS)
def test_strip_and_insert(kind):
    model = NETS[kind]().double()
    found = norms(model)
    model = batchnorm.strip(model, X)
    assert not norms(model)
    assert model(X).shape == X.shape
    inserted = batchnorm.insert(model, X)
    hidden = [module for module in inserted.modules() if isinstance(module, Normalized)]
    assert len(hidden) == (0 if "root" in kind else len({id(norm) for norm in found.values()}))
