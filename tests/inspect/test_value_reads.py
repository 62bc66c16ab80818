"""A run sees where Python comes to know values that another input would change, and no other readings."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.inspect.from_run import graph_of_run

X = torch.randn(2, 3, 4, 4)


class Net(nn.Module):
    def __init__(self, look) -> None:
        super().__init__()
        self.conv, self.look = nn.Conv2d(3, 3, 1), look
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        self.look(self, x)
        return self.conv(x)


def graph(look):
    return graph_of_run(Net(look).eval(), X, "test")


READS = {
    "bool": lambda m, x: bool(x.sum() > 0),
    "item": lambda m, x: x.mean().item(),
    "int": lambda m, x: int(x.argmax()),
    "index": lambda m, x: [1, 2][(x[0, 0, 0, 0] > 0).long()],
    "tolist": lambda m, x: x.tolist(),
    "numpy": lambda m, x: x.numpy(),
    "asarray": lambda m, x: np.asarray(x),
    "dlpack": lambda m, x: np.from_dlpack(x),
    "equal": lambda m, x: torch.equal(x, -x),
    "allclose": lambda m, x: torch.allclose(x, -x),
    "contains": lambda m, x: 7 in x,
    "is_nonzero": lambda m, x: x.sum().is_nonzero(),
    "format": lambda m, x: f"{x.sum()}",
    "storage": lambda m, x: x.untyped_storage()[0],
    "how many": lambda m, x: len(x[x > 0]),
    "nonzero": lambda m, x: x.nonzero().shape,
    "unique": lambda m, x: torch.unique(x).numel(),
    "of a layer's result": lambda m, x: bool(m.conv(x).max() > 0),
    "written into a constant": lambda m, x: bool(torch.zeros(x.shape).copy_(x).sum() > 0),
    "drawn by torch": lambda m, x: bool(torch.rand(()) > 0.5),
    "in a part of a constant": lambda m, x: (c := torch.zeros(3), c[1:].add_(x.sum()), bool(c.sum() > 0)),
}
SAME_ALWAYS = {
    "a parameter": lambda m, x: bool(m.conv.weight.sum() > 0),
    "a buffer": lambda m, x: m.steps.item(),
    "computed of buffers": lambda m, x: (m.steps * torch.arange(3)).tolist(),
    "a shape": lambda m, x: x.shape[0] > 1 and x.size(1) == 3,
    "places": lambda m, x: x[:, torch.tensor([0, 2])],
    "a value that stays a tensor": lambda m, x: torch.where(x.sum() > 0, x, -x),
    "drawn and kept a tensor": lambda m, x: x + torch.rand(()),
}


@pytest.mark.parametrize("look", READS)
def test_readings_are_noted(look):
    reads = graph(READS[look]).value_reads
    assert reads
    assert all(read.startswith("the model reads values by ") for read in reads)


@pytest.mark.parametrize("look", SAME_ALWAYS)
def test_what_no_input_changes_may_be_read(look):
    assert graph(SAME_ALWAYS[look]).value_reads == ()


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python(draw):
    assert graph(lambda m, x: draw()).draws_in_python
    assert not graph(lambda m, x: torch.rand(2)).draws_in_python


def test_the_module_is_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Net(READS["item"])).eval()
    assert graph_of_run(model, X, "test").value_reads == ("1 reads values by bool(), int() or item()",)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch deprecates it; models have such parts
def test_control_flow_inside_a_scripted_part():
    class Flow(nn.Module):
        def forward(self, x):
            if bool(x.sum() > 0):
                return x
            return -x

    model = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(Flow())).eval()
    assert graph_of_run(model, X, "test").value_reads


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # as above
def test_a_scripted_part_with_layers_of_its_own():
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout()).eval())
    seen = graph_of_run(nn.Sequential(nn.Conv2d(3, 3, 1), part).eval(), X, "test")
    assert seen.value_reads == ()
    assert [call.name for call in seen.calls] == ["0"]
