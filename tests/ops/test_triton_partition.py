"""How tensors are partitioned: every element once, in numbers that 32 bits hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.ops import register
from tests.ops.test_operators import layout

pytest.importorskip("triton", reason="the kernels are written in Triton, which has wheels for Linux only")
import triton
import triton.language as tl

from batchnorm.ops.triton import launch, tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=300)
def test_division_by_multiplication(divisor, n):
    magic, bits = launch.reciprocal(divisor)
    assert -(2**31) <= magic < 2**31
    multiple = n // divisor * divisor
    for row in (n, multiple, max(0, multiple - 1), 2**31 - 1):
        assert ((2 * row * (magic % 2**32)) >> 32) >> bits == row // divisor


@triton.jit
def _ends(target, rows, slice_rows, tiles, ROWS: tl.constexpr):
    _, _, _, _, first_row, end_row, _ = tile.locate(rows, 1, slice_rows, 1, tiles, 1, True, ROWS, 1)
    tl.store(target + 2 * tl.program_id(0), first_row)
    tl.store(target + 2 * tl.program_id(0) + 1, end_row)


def test_rows_are_numbered_up_to_the_most_that_are_covered():
    """Two slices, the second short, of as many rows as int32 has numbers for."""
    rows, slice_rows, tile_rows = register.MAX_ROWS - 1, 1_500_000_000, 64
    found = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    _ends[(2,)](found, rows, slice_rows, launch.ceil_div(slice_rows, tile_rows), ROWS=tile_rows)
    assert found.tolist() == [[0, slice_rows], [slice_rows, rows]]
    assert register.covers(torch.empty(rows, 1, device="meta"))
    assert not register.covers(torch.empty(rows + 1, 1, device="meta"))
    assert rows + launch.MAX_TILE < 2**31  # where the last tile ends at the most


def test_the_partition_covers_every_element_once():
    """Every size of tensor, without running a kernel: chunks of full tiles reach the end, and none lies beyond it."""
    for shape in [(256, 64, 56, 56), (3, 3, 224, 224), (8, 2048, 7, 7), (60, 100), (1, 1, 5), (70000, 3), (2, 512, 1)]:
        for memory in ("contiguous", "channels_last"):
            x = layout(torch.empty(shape, device="meta"), memory)
            for slice_size in (0, 1, 7):
                for pass_ in (launch.STATS, launch.REDUCE, launch.APPLY, launch.ELEMENT):
                    plan = launch.make_plan(x, slice_size, pass_)
                    reach = plan.chunks * plan.tiles * plan.tile[0]
                    assert reach >= plan.slice_rows > (plan.chunks - 1) * plan.tiles * plan.tile[0]
                    assert plan.slices * plan.slice_rows >= plan.rows
                    assert plan.tile[0] * plan.tile[1] <= max(launch.MAX_TILE, launch.MAX_FUSED)
                    assert not plan.fused or plan.chunks == plan.tiles == 1
                    assert plan.tiles <= launch.MAX_TILES
                    assert plan.programs < 2**31
