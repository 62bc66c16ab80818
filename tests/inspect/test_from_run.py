"""A run sees who reads a result, also what no operator reads and what only holds it."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from batchnorm import diagnose, fold, insert
from batchnorm.inspect.from_fx import graph_of_trace
from batchnorm.inspect.from_run import graph_of_run
from batchnorm.inspect.graph import KEPT
from batchnorm.inspect.modules import names_of
from batchnorm.model_tools.insert import Normalized

X = torch.randn(2, 3, 4, 4)
HELD: list[object] = []


class Slots:
    __slots__ = ("value",)


class Net(nn.Module):
    """conv → norm, and whatever `keep(module, result)` does with the convolution's result."""

    slots, of_class = Slots(), None

    def __init__(self, keep) -> None:
        super().__init__()
        self.conv, self.norm, self.keep = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), keep
        self.norm.running_mean.normal_()

    def forward(self, x):
        h = self.conv(x)
        self.keep(self, h)
        return self.norm(h).relu()


def closure():
    cell = None

    def keep(m, h):
        nonlocal cell
        cell = h

    return keep


KEEP = {
    "attribute": lambda m, h: setattr(m, "raw", h),
    "buffer": lambda m, h: m.register_buffer("raw", h),
    "class": lambda m, h: setattr(type(m), "of_class", h),
    "slot": lambda m, h: setattr(m.slots, "value", h),
    "object": lambda m, h: setattr(m, "state", SimpleNamespace(nest={"a": [h]})),
    "view": lambda m, h: setattr(m, "raw", h[:, 1:].transpose(2, 3)),
    "copy": lambda m, h: setattr(m, "raw", h.permute(0, 2, 3, 1).contiguous()),
    "detached": lambda m, h: setattr(m, "raw", h.detach()),
    "closure": closure(),
    "global": lambda m, h: HELD.append(h),
    "queue": lambda m, h: setattr(m, "queue", deque([h], maxlen=2)),
    "partial": lambda m, h: setattr(m, "later", functools.partial(torch.add, h)),
    "generator": lambda m, h: setattr(m, "later", (row for row in h)),
    "array": lambda m, h: setattr(m, "raw", h.numpy()),
}
READ = {
    "a number": lambda m, h: setattr(m, "log", h.mean().item()),
    "a list": lambda m, h: setattr(m, "log", h.tolist()),
    "bytes": lambda m, h: setattr(m, "log", pickle.dumps(h)),
    "a deep copy": lambda m, h: setattr(m, "log", copy.deepcopy(h)),
    "a computed tensor": lambda m, h: setattr(m, "log", h.abs()),
    "an array's copy": lambda m, h: setattr(m, "log", h.numpy().copy()),
}


@pytest.fixture(autouse=True)
def _let_go():
    yield
    HELD.clear()
    Net.slots = Slots()
    Net.of_class = None


def readers(model, x=X):
    conv = next(call for call in graph_of_run(model, x, "test").calls if call.name == "conv")
    return [reader.name for reader in conv.readers]


@pytest.mark.parametrize("how", KEEP)
def test_what_holds_a_result_after_the_forward_is_its_reader(how):
    assert KEPT.name in readers(Net(KEEP[how]).eval())


@pytest.mark.parametrize("how", READ)
def test_what_takes_a_results_values_is_its_reader(how):
    assert set(readers(Net(READ[how]).eval())) > {"norm"}


@pytest.mark.parametrize("how", [*KEEP, *READ])
def test_the_layer_stays_and_so_does_the_held_value(how):
    model = Net((KEEP | READ)[how]).eval()
    folded, report = fold(model, (X,))
    assert not report.folded
    assert torch.equal(folded.conv.weight, model.conv.weight)
    assert "conv" in report.entries[0].reason or "control flow" in report.entries[0].reason
    assert not diagnose(model, [X], select=["BN402"]).findings


def test_a_hook_that_collects_results():
    found: dict[str, torch.Tensor] = {}
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)).eval()
    model[0].register_forward_hook(lambda m, args, out: found.update(features=out))
    assert "something holds it" in fold(model, (X,)).report.entries[0].reason


def test_an_input_that_takes_the_result_in():
    class Writes(Net):
        def forward(self, batch):
            batch["h"] = self.conv(batch["x"])
            return self.norm(batch["h"])

    assert KEPT.name in readers(Writes(None).eval(), ({"x": X},))


@pytest.mark.parametrize(
    "keep",
    [
        lambda m, h: setattr(m, "shape", h.shape),
        lambda m, h: (circle := SimpleNamespace(h=h), setattr(circle, "self", circle)),
        lambda m, h: None,
    ],
    ids=["its shape", "a circle that is let go", "nothing"],
)
def test_what_does_not_hold_a_result(keep):
    assert readers(Net(keep).eval()) == ["norm"]
    assert fold(Net(keep).eval(), (X,)).report.folded


def test_the_normalizations_own_result_may_be_held_unless_it_moves_into_the_layer_after():
    class After(nn.Module):
        def __init__(self, before) -> None:
            super().__init__()
            self.before, self.norm, self.last = before, nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            self.seen = self.norm(self.before(x))
            return self.last(self.seen)

    assert fold(After(nn.Conv2d(3, 3, 1)).eval(), (X,)).report.entries[0].into == "before"
    assert "something holds it" in fold(After(nn.ReLU()).eval(), (X,)).report.entries[0].reason


def test_a_result_of_an_earlier_forward_hinders_nobody():
    model = Net(KEEP["attribute"])
    model(X)  # leaves a tensor with a gradient, which deepcopy refuses
    assert model.raw.grad_fn is not None
    raw = model.raw
    assert not fold(model.eval(), (X,)).report.folded
    assert model.raw is raw


class Held(nn.Module):
    """Two hidden layers and an output layer; `keep` may hold the first one's result, and what `side` makes of it."""

    def __init__(self, keep) -> None:
        super().__init__()
        self.first, self.side, self.second, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.keep = keep

    def forward(self, x):
        h = self.first(x)
        self.keep(self, h)
        return self.last(self.second(h.relu()).relu())


HIDDEN = {
    "nothing": (lambda m, h: None, {"first", "second"}),
    "a hidden result": (lambda m, h: setattr(m, "seen", h), {"first", "second"}),
    "a view of it": (lambda m, h: setattr(m, "seen", h[:, 1:]), {"first", "second"}),
    "an auxiliary output": (lambda m, h: setattr(m, "aux", m.side(h)), {"first", "second"}),
    "a function of one": (lambda m, h: setattr(m, "aux", m.side(h).sigmoid()), {"first", "second"}),
    "a hidden auxiliary layer": (lambda m, h: m.second(m.side(h)), {"first", "second", "side"}),
}


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("trace", [False, True])
def test_a_held_result_is_an_output_where_no_layer_reads_it(how, trace):
    keep, hidden = HIDDEN[how]
    model, x = Held(keep), torch.randn(3, 4)
    graph = graph_of_trace(model) if trace else graph_of_run(model, x, "test")
    called = {call.module for call in graph.calls}
    names = names_of(model)
    assert {names[layer] for layer in called - graph.output_layers()} == hidden
    if not trace:
        insert(model, x)
        assert {
            name for name in hidden | {"side", "last"} if isinstance(model.get_submodule(name), Normalized)
        } == hidden
