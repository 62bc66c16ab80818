"""The front ends of `inspect` make one graph: who feeds whom, who reads what, and what can be folded into what."""

import pytest
import torch
from torch import nn

from batchnorm.inspect.folding import fold_target, scale_and_shift, why_not_into, why_stays
from batchnorm.inspect.from_export import graph_of_export
from batchnorm.inspect.from_fx import graph_of_trace
from batchnorm.inspect.from_run import graph_of_run
from batchnorm.inspect.operators import Effect, effect_of

X = torch.randn(2, 3, 8, 8)
FRONT_ENDS = {
    "run": lambda model: graph_of_run(model, X, "test"),
    "export": lambda model: graph_of_export(model, X),
    "fx": graph_of_trace,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.first, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.side, self.side_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.last(self.first(x))
        y = self.side(x)
        return self.side_norm(y) + y


def targets(model, graph):
    """Each normalization's layer and side, or why it stays."""
    found = {}
    for call in graph.calls:
        if call.effect is not Effect.NORM:
            continue
        reason = why_stays(call.module, graph)
        s, t = scale_and_shift(call.module)
        target = fold_target(call, graph, (), lambda layer, s=s, t=t: why_not_into(layer.module, s, t))
        found[call.name] = reason or (target.layer.name, target.before) if target.layer else target.reason
    return found


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_every_front_end_comes_to_the_same_decision(front_end):
    model = Net().eval()
    found = targets(model, FRONT_ENDS[front_end](model))
    assert found["norm"] == ("conv", True)
    assert found["first"] == ("last", False)
    assert "also read by" in found["side_norm"]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_calls_sources_and_outputs(front_end):
    model = Net().eval()
    graph = FRONT_ENDS[front_end](model)
    calls = {call.name: call for call in graph.calls}
    assert list(calls) == ["conv", "norm", "first", "last", "side", "side_norm"]
    assert calls["norm"].source is calls["conv"]
    assert calls["first"].source is None
    assert calls["last"].source is calls["first"]
    assert calls["conv"].readers == [calls["norm"]]
    assert not calls["conv"].is_output


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_shared_weight_is_seen(front_end):
    model = Net().eval()
    model.side.weight = model.last.weight
    graph = FRONT_ENDS[front_end](model)
    shared = {call.name for call in graph.calls if call.parameters_shared}
    assert {"side", "last"} & shared


class Named(nn.Module):
    """conv → a normalization of this name; an activation reads the convolution's result, or its weight, too."""

    def __init__(self, name: str, reads: str):
        super().__init__()
        self.conv, self.name, self.reads = nn.Conv2d(3, 3, 1), name, reads
        setattr(self, name, nn.BatchNorm2d(3))

    def forward(self, x):
        y = self.conv(x)
        return getattr(self, self.name)(y), torch.relu(y if self.reads == "result" else self.conv.weight)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("name", ["norm", "relu", "kept", "elsewhere"])
def test_a_module_that_bears_an_operators_name_is_not_taken_for_it(front_end, name):
    model = Named(name, "result").eval()
    graph = FRONT_ENDS[front_end](model)
    assert "also read by relu" in targets(model, graph)[name]
    assert not list(graph.directly_normalized())


@pytest.mark.parametrize("front_end", ["run", "export"])
def test_an_operator_that_bears_the_layers_name_shares_its_weight(front_end):
    model = Named("norm", "weight").eval()
    model.relu = model.conv
    del model.conv
    model.__dict__["conv"] = model.relu
    (call,) = [call for call in FRONT_ENDS[front_end](model).calls if call.effect is Effect.LAYER]
    assert call.name == "relu"
    assert call.parameters_shared


def test_a_part_that_cannot_be_traced_does_not_hide_the_others():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else x

    assert [call.name for call in graph_of_trace(nn.Sequential(Branch())).calls] == ["0.body.0", "0.body.1"]


def test_the_table_knows_an_operator_once():
    assert effect_of("convolution") is Effect.LAYER
    assert effect_of("native_batch_norm") is Effect.NORM
    assert effect_of("permute") is Effect.CARRY
    assert effect_of("softmax") is Effect.OTHER
