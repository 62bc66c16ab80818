"""Where the channels of a result lie in what a later call reads, however they were moved in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.inspect.graph import Geometry, GraphNode
from batchnorm.inspect.operators import Effect
from batchnorm.inspect.ways import connect

X = torch.empty(2, 4, 3, 5)
STEPS = {
    "none": ([], nn.BatchNorm2d(4), True, ()),
    "a slice of positions": ([lambda t: t[:, :, 1:]], nn.BatchNorm2d(4), True, ()),
    "flattened": ([lambda t: t.flatten(1)], nn.Linear(60, 1), False, tuple(i // 15 for i in range(60))),
    "turned and back": ([lambda t: t.transpose(1, 3), lambda t: t.transpose(1, 3)], nn.BatchNorm2d(4), True, ()),
    "shuffled": (
        [lambda t: t.unflatten(1, (2, 2)), lambda t: t.transpose(1, 2), lambda t: t.flatten(1, 2)],
        nn.BatchNorm2d(4), False, (0, 2, 1, 3),
    ),
    "a slice of channels": ([lambda t: t[:, 1:3]], nn.BatchNorm2d(2), False, (1, 2)),
    "another axis": ([lambda t: t.transpose(1, 2)], nn.BatchNorm2d(3), False, ()),
    "samples mixed in": ([lambda t: t.reshape(-1, 24)], nn.Linear(24, 1), False, ()),
}  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("steps", STEPS)
def test_the_channels_are_followed(steps, memory_format):
    way, module, aligned, spread = STEPS[steps]
    x = X.to(memory_format=memory_format)
    source = GraphNode("conv", Effect.LAYER, nn.Conv2d(3, 4, 1), output=Geometry.of(x))
    read = x
    for step in way:
        read = step(read)
    call = GraphNode("next", Effect.NORM, module, input=Geometry.of(read))
    connect(source, call, way)
    assert call.source is source
    assert (call.aligned, call.spread) == (aligned, spread)


def test_an_unknown_way_and_an_empty_input_tell_nothing():
    for shape, way in (((2, 4, 3, 5), None), ((0, 4, 3, 5), [lambda t: t[:, :, 1:]])):
        geometry = Geometry.of(torch.empty(shape))
        source = GraphNode("conv", Effect.LAYER, nn.Conv2d(3, 4, 1), output=geometry)
        call = GraphNode("norm", Effect.NORM, nn.BatchNorm2d(4), input=geometry)
        connect(source, call, way)
        assert call.source is source
        assert not call.aligned
        assert call.spread == ()
