"""Every way to write an operator has one name, and a function from elsewhere never has the name of one."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from batchnorm.inspect.from_fx import graph_of_trace
from batchnorm.inspect.operators import Effect, effect_of, keeps_place, node_operator, operator_name

aten = torch.ops.aten
NAMES = [
    (aten.relu.default, "relu"),
    (aten.add_.Tensor, "add_"),
    (torch.relu, "relu"),
    (F.relu, "relu"),
    (torch.relu_, "relu_"),
    (torch.Tensor.relu_, "relu_"),
    (torch.split, "split"),
    (torch.Tensor.split, "split"),
    (F.avg_pool2d, "avg_pool2d"),
    ("view", "view"),
    (operator.add, "add"),
    (operator.iadd, "add_"),
    (operator.itruediv, "div_"),
    (operator.truediv, "div"),
    (operator.and_, "and"),
    (operator.iand, "and_"),
    (operator.ixor, "xor_"),
    (operator.not_, "not"),
    (operator.is_, "is"),
    (operator.invert, "invert"),
    (operator.index, "index"),
    (operator.getitem, "getitem"),
    (operator.setitem, "setitem"),
]


@pytest.mark.parametrize(("target", "name"), NAMES)
def test_every_spelling_has_the_name_of_its_operator(target, name):
    assert operator_name(target) == name


def flatten(x):
    return x.flatten(1).relu()


fx.wrap("flatten")


def test_a_function_of_the_users_is_not_taken_for_an_operator():
    assert effect_of("flatten") is Effect.CARRY
    assert effect_of(operator_name(flatten)) is Effect.OTHER


class Net(nn.Module):
    """`weight` of `t` is read as an attribute, whose name is that of an operator; so is the input's name."""

    def __init__(self, step):
        super().__init__()
        self.t, self.step = nn.Parameter(torch.ones(4)), step
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, view):
        return self.norm(self.step(self.first(view))) + self.t


def test_only_what_runs_an_operator_has_one():
    ran = {node.name: node_operator(node) for node in fx.symbolic_trace(Net(torch.neg)).graph.nodes}
    assert (ran["view"], ran["t"], ran["first"], ran["output"]) == ("", "", "", "")
    assert (ran["neg"], ran["add"]) == ("neg", "add")


def add_in_place(y):
    y += 1
    return y


STEPS = [
    ("a sum in place", add_in_place, True),
    ("a division", lambda y: y / 2, False),
    ("the user's", lambda y: flatten(y), False),
]


@pytest.mark.parametrize(("step", "linear"), [case[1:] for case in STEPS], ids=[case[0] for case in STEPS])
def test_a_trace_sees_whether_a_normalization_still_comes_first(step, linear):
    graph = graph_of_trace(Net(step))
    between = next(node for node in graph.nodes if node.module is None and node.inputs and node.inputs[0].is_call)
    assert keeps_place(between.effect) == linear
    assert bool(graph.normalized_layers()) == linear
