"""How a tensor is cut into programs, and the one place from which kernels are launched.

A kernel sees (N, C, S) as tiles whose second axis is the innermost one in memory: positions of one channel where the
tensor is contiguous, channels where it has its channels innermost (then samples × positions are the N). A program
walks a strip of such tiles down the samples of one ghost slice, in a fixed order. See README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..layout import slices

TILE = 4096  # elements a program holds at a time (half as many of float64): 8 KiB of bfloat16
FUSED = 8192  # a channel (of a slice) that fits this is reduced and applied in one launch, read once
ROW_BYTES = 256  # channels innermost: bytes of one position's channels that a tile takes together
PROGRAMS_PER_SM = 8
LEAST_CHUNKS = 4  # tiles a program reduces at least, so that partial results stay a small part of the traffic


def stages(x: Tensor) -> int:
    """Tiles in flight: while one is reduced, the next are on their way into shared memory.

    Three tensors' tiles must fit the 99 KiB that a block has on every GPU since Ampere.
    """
    return 3 if x.element_size() == 2 else 2


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def programs_wanted(device: torch.device) -> int:
    """How many programs fill the device. Triton's interpreter runs them one by one: a few, so that tests see strips."""
    if device.type != "cuda":
        return 8
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Plan:
    """One tensor's cut: `sizes` are the kernels' run-time arguments, `meta` those known at compile time."""

    rows: int  # ghost slices
    channels: int
    samples: int  # N, or N·S where channels are innermost
    positions: int  # S, or 1
    per_slice: int  # of `samples`
    last: bool  # channels innermost
    tile: tuple[int, int]
    strips: int  # programs down one slice's samples
    chunks: int  # tiles down one strip
    fused: bool

    @property
    def inner_tiles(self) -> int:
        return ceil_div(self.channels if self.last else self.positions, self.tile[1])

    @property
    def parts(self) -> int:
        """Partial results of one channel of one slice."""
        return self.strips * (1 if self.last else self.inner_tiles)

    @property
    def programs(self) -> int:
        return self.rows * self.strips * self.inner_tiles * (1 if self.last else self.channels)

    @property
    def sizes(self) -> tuple[int, ...]:
        stride = self.channels * self.positions
        return (
            self.samples, self.channels, self.positions, stride, self.per_slice,
            self.strips, self.chunks, self.inner_tiles,
        )  # fmt: skip

    def meta(self, input: Tensor) -> dict[str, Any]:
        wide = 1 + (input.element_size() == 8)
        # registers: a thread holds the tile's share of every tensor, 32 elements, or 16 where nothing loops
        warps = self.tile[0] * self.tile[1] * wide // (512 if self.fused else 1024)
        return {
            "LAST": self.last,
            "BN": self.tile[0],
            "BI": self.tile[1],
            "COMPUTE": compute_dtype(input),
            "num_warps": max(1, min(8, warps)),
        }


def compute_dtype(input: Tensor) -> tl.dtype:
    return tl.float64 if input.dtype == torch.float64 else tl.float32


def channels_innermost(x: Tensor) -> bool:
    """Of a dense tensor. Where S = 1 both descriptions hold, and this one has the longer rows."""
    return x.numel() == x.size(0) * x.size(1) or not x.is_contiguous()


def _tile(x: Tensor, last: bool, per_slice: int, positions: int) -> tuple[tuple[int, int], bool]:
    """The tile, and whether it holds all of a channel's values in a slice."""
    wide = 1 + (x.element_size() == 8)
    samples, fused, most = power_of_2(per_slice), FUSED // wide, TILE // wide
    if not last:
        inner = power_of_2(positions)
        if samples * inner <= fused:
            return (samples, inner), True
        inner = min(inner, most // 4)
        return (min(samples, max(1, most // inner)), inner), False
    channels = power_of_2(x.size(1))
    for inner in (min(channels, 32), min(channels, 16)):  # narrow: many programs out of a small tensor
        if samples * inner <= fused:
            return (samples, inner), True
    inner = min(channels, ROW_BYTES // x.element_size(), most)
    return (min(samples, most // inner), inner), False


def plan(x: Tensor, slice_size: int, reduces: bool) -> Plan:
    """The cut of a dense tensor; one that `reduces` writes a partial result a strip, so it makes fewer of them."""
    samples, channels = x.shape[:2]
    positions = x[0, 0].numel()
    rows, per_slice, last = slices(samples, slice_size), slice_size or samples, channels_innermost(x)
    per_slice = min(per_slice, samples)
    if last:
        samples, per_slice, positions = samples * positions, per_slice * positions, 1
    tile, fused = _tile(x, last, per_slice, positions)
    chunks = ceil_div(per_slice, tile[0])
    columns = rows * ceil_div(channels if last else positions, tile[1]) * (1 if last else channels)
    most = ceil_div(chunks, LEAST_CHUNKS) if reduces else chunks
    strips = max(1, min(most, ceil_div(programs_wanted(x.device), columns)))
    chunks = ceil_div(chunks, strips)
    strips = ceil_div(ceil_div(per_slice, tile[0]), chunks)
    return Plan(rows, channels, samples, positions, per_slice, last, tile, strips, chunks, fused)


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
