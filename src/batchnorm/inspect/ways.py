"""From a result to the tensor that a call reads, through what moves elements and changes none: where the channels went.

The way is walked by a tensor that holds at each place the number of its channel, in the memory layout of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .graph import GraphNode

__all__ = ["Step", "connect"]

Step = Callable[[Tensor], Tensor]
_Channels = tuple[int, ...]


def connect(source: GraphNode, call: GraphNode, way: Sequence[Step] | None) -> None:
    """Note that the call reads the source's result by this way; None is one that is not known."""
    call.source = source
    channels = None if way is None else _channels_read(source, call, way)
    if channels is not None:
        of_source, of_call = channels
        call.aligned = of_call == of_source
        call.spread = () if call.aligned else of_call


def _channels_read(source: GraphNode, call: GraphNode, way: Sequence[Step]) -> tuple[_Channels, _Channels] | None:
    """The source's channels, and which of them each channel of the call's input holds; None where one holds several."""
    if source.output is None or call.input is None:
        return None
    shape, stride = source.output.shape, source.output.stride
    axis, after = source.channel_axis(len(shape)), call.channel_axis(len(call.input.shape))
    if axis is None or after is None:
        return None
    channels = tuple(range(shape[axis]))
    if not way:
        return (channels, channels) if axis == after else None
    numbers = torch.empty_strided(shape, stride, dtype=torch.int32)
    numbers.copy_(torch.arange(shape[axis]).view(-1, *[1] * (len(shape) - 1 - axis)))
    for step in way:
        numbers = step(numbers)
    rows = numbers.movedim(after, 0).flatten(1)
    if not rows.numel() or not torch.equal(rows, rows[:, :1].expand_as(rows)):
        return None
    return channels, tuple(rows[:, 0].tolist())
