"""How a tensor is cut into programs, and the one place from which kernels are launched.

A kernel sees a tensor as lines: the channels of one position where they are innermost in memory, else a few adjacent
positions of one channel. A program walks tiles of such lines down one strip of a ghost slice's lines, in a fixed
order. See README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..layout import slices


@dataclass(frozen=True)
class Pass:
    """How a kernel goes through a large tensor; docs/performance-gpu.md has the measurements."""

    thread_bytes: int  # of each tensor that a thread holds at a time
    warps: int
    stages: int  # tiles in flight: those ahead of the one at work are on their way into shared memory
    programs: int  # a multiprocessor
    least_chunks: int = 1  # tiles a program takes at least: partial results stay a small part of the traffic


STATS = Pass(thread_bytes=64, warps=4, stages=4, programs=2, least_chunks=4)
REDUCE = Pass(thread_bytes=64, warps=4, stages=3, programs=16, least_chunks=4)
APPLY = Pass(thread_bytes=64, warps=4, stages=3, programs=64)
ELEMENT = Pass(thread_bytes=64, warps=4, stages=3, programs=64)
TILE = 16384  # elements a program holds at a time, at most
FUSED = 8192  # a channel (of a slice) that fits this is reduced and applied in one launch, read once
VECTOR_BYTES = 16  # the widest access a thread has
ROW_BYTES = 128  # channels innermost: bytes of one position's channels that a tile takes together
ACCESSES = 4  # of each tensor that a thread makes for a tile: narrow ones fill it with fewer bytes
MOST_CHUNKS = 128  # and at most: a thread's float32 sums are of no more terms


# Arguments whose values a kernel is not compiled for: they differ from layer to layer.
SIZES = ["samples", "magic", "bits", "per_slice", "strips", "chunks", "tiles"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of the device. Triton's interpreter runs programs one by one: few, so that tests see strips."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Plan:
    """One tensor's cut: `sizes` are the kernels' run-time arguments, `meta` those known at compile time."""

    rows: int  # ghost slices
    channels: int
    samples: int  # lines: N·S where channels are innermost, else N times the vectors of a map
    vectors: int  # lines of one sample's map, or 1
    per_slice: int  # of `samples`
    last: bool  # channels innermost
    unit: int  # elements that divide the beginning of every line
    tile: tuple[int, int]
    strips: int  # programs down one slice's lines
    chunks: int  # tiles down one strip
    fused: bool
    warps: int
    stages: int
    wide: bool  # 2³¹ elements or more
    size: int  # of an element, in bytes

    @property
    def tiles(self) -> int:
        """Programs beside one another, over the channels."""
        return ceil_div(self.channels, self.tile[1]) if self.last else self.channels

    @property
    def programs(self) -> int:
        return self.rows * self.strips * self.tiles

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        units = self.channels // self.unit if self.last else self.channels
        return (
            self.samples, self.channels, units, self.vectors, *reciprocal(self.vectors), self.per_slice,
            self.strips, self.chunks, self.tiles,
        )  # fmt: skip

    @cached_property
    def even(self) -> bool:
        """Whether every tile is whole."""
        whole_lines = self.per_slice % self.tile[0] == 0 and self.samples % self.per_slice == 0
        return whole_lines and (not self.last or self.channels % self.tile[1] == 0)

    @cached_property
    def _meta(self) -> dict[str, Any]:
        known = {"LAST": self.last, "UNIT": self.unit, "WIDE": self.wide, "EVEN": self.even, "num_warps": self.warps}
        known |= {"BN": self.tile[0], "BI": self.tile[1], "COMPUTE": tl.float64 if self.size == 8 else tl.float32}
        return known if self.fused else known | {"STAGES": self.stages}

    def meta(self, mask: Tensor | None = None) -> dict[str, Any]:
        """A mask is looked at element by element, as a tile is that is not whole."""
        return self._meta if mask is None else self._meta | {"EVEN": False}


def reciprocal(divisor: int) -> tuple[int, int]:
    """(m, s) with n // divisor = (2n·m >> 32) >> s for 0 ≤ n < 2³¹; m has 32 bits, here as a signed integer.

    Source: Granlund & Montgomery 1994, Division by invariant integers using multiplication, theorem 4.2.
    """
    s = (divisor - 1).bit_length()
    m = (1 << (31 + s)) // divisor + 1
    return m - (1 << 32) if m >= 1 << 31 else m, s


def channels_innermost(x: Tensor) -> bool:
    """Of a dense tensor. Where S = 1 both descriptions hold, and this one has the longer rows."""
    return x.numel() == x.size(0) * x.size(1) or not x.is_contiguous()


def plan(x: Tensor, slice_size: int, how: Pass) -> Plan:
    """The cut of a dense tensor for a pass."""
    limits, last = (TILE, FUSED, MOST_CHUNKS), channels_innermost(x)
    return _plan(tuple(x.shape), x.element_size(), last, slice_size, how, limits, multiprocessors(x.device))


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    size: int,
    last: bool,
    slice_size: int,
    how: Pass,
    limits: tuple[int, int, int],
    processors: int,
) -> Plan:
    samples, channels = shape[:2]
    positions, wide = math.prod(shape[2:]), math.prod(shape) >= 2**31
    rows, per_slice = slices(samples, slice_size), min(slice_size or samples, samples)
    unit = math.gcd(channels if last else positions, VECTOR_BYTES // size)
    vectors = 1 if last else positions // unit
    lines = positions if last else vectors
    samples, per_slice = samples * lines, per_slice * lines
    tile, fused, warps = _tile(channels if last else unit, last, per_slice, size, unit, how, limits)
    chunks = ceil_div(per_slice, tile[0])
    columns = rows * (ceil_div(channels, tile[1]) if last else channels)
    strips = max(1, min(ceil_div(chunks, how.least_chunks), ceil_div(how.programs * processors, columns)))
    chunks = min(ceil_div(chunks, strips), limits[2])
    strips = ceil_div(ceil_div(per_slice, tile[0]), chunks)
    cut = (tile, strips, chunks, fused, warps, how.stages, wide, size)
    return Plan(rows, channels, samples, vectors, per_slice, last, unit, *cut)


def _tile(
    inner: int, last: bool, per_slice: int, size: int, unit: int, how: Pass, limits: tuple[int, int, int]
) -> tuple[tuple[int, int], bool, int]:
    """The tile, whether it holds all of a channel's values in a slice, and the warps that share it."""
    lines, width = power_of_2(per_slice), power_of_2(inner)
    wide = 1 + (size == 8)
    for narrow in (min(width, 32), min(width, 16)):  # narrow: many programs out of a small tensor
        if lines * narrow <= limits[1] // wide:
            # registers: a thread holds the tile's share of every tensor, 16 elements
            return (lines, narrow), True, max(1, min(8, lines * narrow * wide // 512))
    thread = min(how.thread_bytes, max(16, ACCESSES * unit * size)) // size
    most = min(limits[0] // wide, how.warps * 32 * thread)
    width = min(width, max(ROW_BYTES // size, 1) if last else width, most)
    tile = (min(lines, most // width), width)
    return tile, False, max(1, min(how.warps, tile[0] * tile[1] // (32 * thread)))


def same_layout(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """`tensor` in the memory order of the dense tensor `x`: itself where it already is."""
    if tensor is None:
        return None
    ordered = tensor.movedim(1, -1) if channels_innermost(x) else tensor
    return tensor if ordered.is_contiguous() else torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def run(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Launch over a one-dimensional grid (its limit is 2³¹, not the 65535 of the other dimensions)."""
    kernel[(programs,)](*arguments, **meta)
