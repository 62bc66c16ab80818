"""Every pair of faults that a repair can mend: seeded together, repaired, evaluated, and good again."""

import copy
import itertools

import pytest
import torch
from torch import nn

from batchnorm import freeze
from batchnorm.doctor.repair import repair
from tests.doctor.faults import data, norms
from tests.doctor.nets import CLASSES, Net, batches_for, train


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


NET = Net(network, (3, 8, 8))


def moved(model):
    for number, layer in enumerate(norms(model)):
        layer.running_mean += 20 * torch.randn(layer.num_features, generator=torch.Generator().manual_seed(number))


def reset(model):
    for layer in norms(model):
        layer.reset_running_stats()


def broken(model):
    norms(model)[0].running_var[2] = float("nan")


def negative(model):
    norms(model)[-1].running_var[1] = -1.0


def momentum(model):
    for layer in norms(model):
        layer.momentum = 0.99


def held(model):
    for layer in norms(model):
        layer.requires_grad_(False)


def frozen(model):
    freeze(model)


def untracked(model):
    layer = norms(model)[-1]
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    layer.track_running_stats = False


def left_in_train(model):
    norms(model)[-1].train()


FAULTS = [moved, reset, broken, negative, momentum, held, frozen, untracked, left_in_train]


@pytest.fixture(scope="module")
def good():
    torch.manual_seed(1)
    return train(NET.make(), batches_for(NET, 36, 32, seed=1), 150).eval()


def accuracy(model, batches):
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / sum(len(y) for _, y in batches)


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.combinations(FAULTS, 2)], ids=lambda fault: getattr(fault, "__name__", None)
)
@pytest.mark.parametrize("training", [False, True])
def test_a_pair_is_recovered(good, first, second, training):
    # A layer without statistics cannot be frozen, so it loses them afterwards.
    if first is frozen and second is untracked:
        pytest.skip("a frozen layer takes its own statistics with it")
    model, test = copy.deepcopy(good).train(training), data(NET, 8)
    before = accuracy(copy.deepcopy(model).eval(), test)
    first(model), second(model)
    assert model.training == training
    report = repair(model, data(NET, 24))
    assert accuracy(model.eval(), test) >= before - 0.02, report.summary()
    assert report.verified, report.summary()
    assert [f for f in report.diagnosis.findings if f.severity == "error"] == []
