"""Partition a tensor into programs and tiles, and launch kernels. All kernels are launched by `run`.

A kernel sees a tensor as rows. In channels_last a row is the channels of one pixel. In contiguous memory a row is a
vector: a few adjacent pixels of one channel. A tile is some rows by their width. A
program reads one chunk of the rows of a ghost slice, tile after tile, in a fixed order. README.md has more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..layout import slice_count


@dataclass(frozen=True)
class Pass:
    """How a kernel reads a large tensor. docs/performance-gpu.md has the measurements behind the values."""

    thread_bytes: int  # of each tensor that a thread holds at a time
    warps: int
    stages: int  # tiles in flight: the pipeline copies the next ones to shared memory during the work on one
    programs: int  # per multiprocessor
    min_tiles: int = 1  # per chunk, so that the partial results are a small part of the memory traffic


STATS = Pass(thread_bytes=64, warps=4, stages=4, programs=2, min_tiles=4)
REDUCE = Pass(thread_bytes=64, warps=4, stages=3, programs=16, min_tiles=4)
APPLY = Pass(thread_bytes=64, warps=4, stages=3, programs=64)
ELEMENT = Pass(thread_bytes=64, warps=4, stages=3, programs=64)
MAX_TILE = 16384  # elements of a tile
MAX_FUSED = 8192  # values of a channel in a slice that one launch reduces and applies, with one read of them
MAX_TILES = 128  # per chunk: each float32 sum of a thread has at most this many terms
VECTOR_BYTES = 16  # of the widest access of a thread
ROW_BYTES = 128  # of a pixel's channels that a tile has in channels_last
ACCESSES = 4  # per thread, tensor and tile: a thread whose accesses are narrow holds less than `thread_bytes`

# Kernel arguments for whose values no kernel is compiled, because they differ from layer to layer.
SIZE_ARGUMENTS = ["rows", "magic", "bits", "slice_rows", "chunks", "tiles", "channel_blocks"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device.

    Triton's interpreter, which the tests use on the CPU, gets a small number, so that chunks have several tiles there.
    """
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class TilePlan:
    """The partition of one tensor: `sizes` are run-time arguments of the kernels, `meta` compile-time constants."""

    slices: int  # ghost slices
    channels: int
    rows: int  # of the tensor: N·S in channels_last, else N times `map_vectors`
    map_vectors: int  # contiguous: vectors in one channel of one sample; channels_last: 1
    slice_rows: int  # rows of one slice
    channels_last: bool
    vector: int  # elements of one access: it divides the offset of every row
    tile: tuple[int, int]  # rows, width
    chunks: int  # programs per slice and channel block
    tiles: int  # per chunk
    fused: bool  # one tile holds all values of a channel in a slice
    warps: int
    stages: int
    large: bool  # 2³¹ elements or more
    size: int  # of an element, in bytes

    @property
    def channel_blocks(self) -> int:
        """Return the number of programs that share the channels of a row in channels_last; else the channels."""
        return ceil_div(self.channels, self.tile[1]) if self.channels_last else self.channels

    @property
    def programs(self) -> int:
        return self.slices * self.chunks * self.channel_blocks

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Return the size arguments of a kernel; `pixel_vectors` is the third, the channels in contiguous memory."""
        pixel_vectors = self.channels // self.vector if self.channels_last else self.channels
        return (
            self.rows, self.channels, pixel_vectors, self.map_vectors, *reciprocal(self.map_vectors), self.slice_rows,
            self.chunks, self.tiles, self.channel_blocks,
        )  # fmt: skip

    @cached_property
    def full(self) -> bool:
        """Return whether every tile is full, so that kernels need no bounds checks."""
        full_rows = self.slice_rows % self.tile[0] == 0 and self.rows % self.slice_rows == 0
        return full_rows and (not self.channels_last or self.channels % self.tile[1] == 0)

    @cached_property
    def _meta(self) -> dict[str, Any]:
        constants = {"NHWC": self.channels_last, "VECTOR": self.vector, "LARGE": self.large, "FULL": self.full}
        constants |= {"ROWS": self.tile[0], "WIDTH": self.tile[1], "num_warps": self.warps}
        constants |= {"COMPUTE": tl.float64 if self.size == 8 else tl.float32}
        return constants if self.fused else constants | {"STAGES": self.stages}

    def meta(self, mask: Tensor | None = None) -> dict[str, Any]:
        """Return the compile-time constants. With a mask, kernels check every element, as in a partial tile."""
        return self._meta if mask is None else self._meta | {"FULL": False}


def reciprocal(divisor: int) -> tuple[int, int]:
    """Compute (m, s) with n // divisor = (2n·m >> 32) >> s for 0 ≤ n < 2³¹. m has 32 bits, here as a signed integer.

    Source: Granlund & Montgomery 1994, Division by invariant integers using multiplication, theorem 4.2.
    """
    s = (divisor - 1).bit_length()
    m = (1 << (31 + s)) // divisor + 1
    return m - (1 << 32) if m >= 1 << 31 else m, s


def is_channels_last(x: Tensor) -> bool:
    """Return whether a dense tensor is channels_last. With one pixel it is both, and is used as channels_last.

    Its rows are longer there.
    """
    return x.numel() == x.size(0) * x.size(1) or not x.is_contiguous()


def make_plan(x: Tensor, slice_size: int, settings: Pass) -> TilePlan:
    """Partition a dense tensor for a pass."""
    limits, channels_last = (MAX_TILE, MAX_FUSED, MAX_TILES), is_channels_last(x)
    return _plan(
        tuple(x.shape), x.element_size(), channels_last, slice_size, settings, limits, multiprocessors(x.device)
    )


@lru_cache(maxsize=4096)
def _plan(
    shape: tuple[int, ...],
    size: int,
    channels_last: bool,
    slice_size: int,
    settings: Pass,
    limits: tuple[int, int, int],
    processors: int,
) -> TilePlan:
    samples, channels = shape[:2]
    pixels, large = math.prod(shape[2:]), math.prod(shape) >= 2**31
    slices, slice_samples = slice_count(samples, slice_size), min(slice_size or samples, samples)
    vector = math.gcd(channels if channels_last else pixels, VECTOR_BYTES // size)
    map_vectors = 1 if channels_last else pixels // vector
    sample_rows = pixels if channels_last else map_vectors
    rows, slice_rows = samples * sample_rows, slice_samples * sample_rows
    row = channels if channels_last else vector
    tile, fused, warps = _tile(row, channels_last, slice_rows, size, vector, settings, limits)
    tiles = ceil_div(slice_rows, tile[0])
    columns = slices * (ceil_div(channels, tile[1]) if channels_last else channels)
    chunks = max(1, min(ceil_div(tiles, settings.min_tiles), ceil_div(settings.programs * processors, columns)))
    tiles = min(ceil_div(tiles, chunks), limits[2])
    chunks = ceil_div(ceil_div(slice_rows, tile[0]), tiles)
    partition = (tile, chunks, tiles, fused, warps, settings.stages, large, size)
    return TilePlan(slices, channels, rows, map_vectors, slice_rows, channels_last, vector, *partition)


def _tile(
    row: int,
    channels_last: bool,
    slice_rows: int,
    size: int,
    vector: int,
    settings: Pass,
    limits: tuple[int, int, int],
) -> tuple[tuple[int, int], bool, int]:
    """Choose the tile (rows, width), whether it holds all values of a channel in a slice, and its warps.

    Args:
        row: elements of a row.
    """
    rows, width = power_of_2(slice_rows), power_of_2(row)
    words = 1 + (size == 8)  # registers of an element
    for narrow in (min(width, 32), min(width, 16)):  # a narrow tile gives a small tensor more programs
        if rows * narrow <= limits[1] // words:
            # a thread holds 16 elements of each tensor in registers
            return (rows, narrow), True, max(1, min(8, rows * narrow * words // 512))
    thread = min(settings.thread_bytes, max(16, ACCESSES * vector * size)) // size
    max_elements = min(limits[0] // words, settings.warps * 32 * thread)
    width = min(width, max(ROW_BYTES // size, 1) if channels_last else width, max_elements)
    tile = (min(rows, max_elements // width), width)
    return tile, False, max(1, min(settings.warps, tile[0] * tile[1] // (32 * thread)))


def same_layout(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Return `tensor` in the layout of the dense tensor `x`; a copy only where the layouts differ."""
    if tensor is None:
        return None
    ordered = tensor.movedim(1, -1) if is_channels_last(x) else tensor
    return tensor if ordered.is_contiguous() else torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def contiguous_vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def run(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Launch a kernel. The grid has one dimension, whose limit is 2³¹; the other dimensions end at 65535."""
    kernel[(programs,)](*arguments, **meta)
