"""A layer's call: how short the common one is, and which operator each place and each question come to."""

import sys

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNorm2d, BatchNormAct2d, Renorm
from batchnorm.ops import extension
from tests.ops.training import COMPILED


def python_calls(function, *arguments):
    """The Python functions that a call enters, in order."""
    names = []

    def note(frame, event, _):
        if event == "call":
            names.append((frame.f_globals.get("__name__"), frame.f_code.co_name))

    function(*arguments)  # what is resolved once is resolved
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.skipif(COMPILED is None, reason="csrc/autograd was not built against this torch")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [BatchNorm2d, BatchNormAct2d])
def test_the_common_call_is_short_and_enters_no_module_twice(make, training):
    calls = python_calls(make(4).train(training), torch.randn(8, 4, 5, 5, requires_grad=True))
    assert len(calls) <= 6, calls
    modules = [name for name, _ in calls]
    assert len([m for i, m in enumerate(modules) if m not in modules[:i]]) == len(
        [m for i, m in enumerate(modules) if i == 0 or m != modules[i - 1]]
    )


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "batchnorm" or "batch_norm" in name:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def x():
    return torch.randn(6, 3, 4, 4, requires_grad=True)


def held():
    return torch.randn(6, 3, 4, 4, requires_grad=True) * 1


def seen_by(function):
    with Operators() as log:
        function()
    return log.seen


def inplace(layer):
    return layer(held())


EAGER = {
    "plain": (lambda: BatchNorm2d(3), ["forward_update_running_"]),
    "masked": (lambda: BatchNorm2d(3), ["forward_update_running_"]),
    "ghost": (lambda: BatchNorm2d(3, ghost_batch_size=2), ["forward_update_running_"]),
    "no buffers": (lambda: BatchNorm2d(3, track_running_stats=False), ["forward"]),
    "renorm": (lambda: BatchNorm2d(3, renorm=Renorm()), ["stats", "apply", "update_running_"]),
    "running": (lambda: BatchNorm2d(3).eval(), ["apply"]),
    "accumulation": (lambda: BatchNorm2d(3, accumulation_steps=2), ["forward"]),
}


@pytest.mark.parametrize("name", EAGER)
def test_the_eager_row(name):
    make, wanted = EAGER[name]
    layer, arguments = make(), (torch.rand(6, 4, 4) < 0.7,) if name == "masked" else ()
    assert seen_by(lambda: layer(x(), *arguments)) == wanted


@pytest.mark.skipif(not extension.LOADED, reason="only the compiled kernels write over their input")
def test_the_eager_row_in_place():
    layer = BatchNormAct2d(3, "leaky_relu", inplace=True)
    assert seen_by(lambda: layer(held())) == ["forward_inplace_"]


@pytest.mark.parametrize(("make", "count"), [(EAGER["plain"][0], 1), (EAGER["renorm"][0], 1), (EAGER["ghost"][0], 1)])
def test_the_recompute_row_moves_nothing(make, count):
    layer = make()
    out = checkpoint(layer, x(), use_reentrant=False)
    again = seen_by(lambda: out.backward(torch.randn_like(out)))
    assert not [name for name in again if "update_running" in name]
    assert layer.num_batches_tracked == count


def test_the_transformed_row_is_torchs():
    layer = BatchNorm2d(3).eval()
    names = seen_by(lambda: vmap(lambda t: layer(t))(torch.randn(2, 6, 3, 4, 4)))
    assert names
    assert not [name for name in names if hasattr(torch.ops.batchnorm, name) and "batch_norm" not in name]


def test_the_compiling_row_asks_whether_it_is_a_recomputation():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(BatchNorm2d(3), backend=keep, fullgraph=True)(x())
    assert "update_running_once_" in graphs[0].code


def test_a_pickle_of_0_1_is_read_or_refused():
    layer = BatchNorm2d(3)
    state = dict(nn.BatchNorm2d(3).__dict__) | {"activation": None, "ghost_batch_size": 2, "nonfinite": "propagate"}
    layer.__setstate__(dict(state))
    assert layer.ghost_batch_size == 2
    with pytest.raises(batchnorm.errors.UserError, match="BatchNormAct"):
        layer.__setstate__(state | {"activation": "relu"})
