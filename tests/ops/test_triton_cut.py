"""How tensors are cut into programs: every element once, in numbers that 32 bits hold."""

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
    whole = n // divisor * divisor
    for line in (n, whole, max(0, whole - 1), 2**31 - 1):
        assert ((2 * line * (magic % 2**32)) >> 32) >> bits == line // divisor


@triton.jit
def _ends(to, samples, per_slice, chunks, BN: tl.constexpr):
    _, _, _, _, first, last, _ = tile.locate(samples, 1, per_slice, 1, chunks, 1, True, BN, 1)
    tl.store(to + 2 * tl.program_id(0), first)
    tl.store(to + 2 * tl.program_id(0) + 1, last)


def test_lines_are_numbered_up_to_the_most_that_are_covered():
    """Two slices, the second short, of as many lines as int32 has numbers for."""
    samples, per_slice, lines = register.MOST_LINES - 1, 1_500_000_000, 64
    found = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    _ends[(2,)](found, samples, per_slice, launch.ceil_div(per_slice, lines), BN=lines)
    assert found.tolist() == [[0, per_slice], [per_slice, samples]]
    assert register.covers(torch.empty(samples, 1, device="meta"))
    assert not register.covers(torch.empty(samples + 1, 1, device="meta"))
    assert samples + launch.TILE < 2**31  # where the last tile ends at the most


def test_the_cut_covers_every_element_once():
    """Every size of tensor, without running a kernel: strips of whole chunks reach the end, and none lies beyond it."""
    for shape in [(256, 64, 56, 56), (3, 3, 224, 224), (8, 2048, 7, 7), (60, 100), (1, 1, 5), (70000, 3), (2, 512, 1)]:
        for memory in ("contiguous", "channels_last"):
            x = layout(torch.empty(shape, device="meta"), memory)
            for slice_size in (0, 1, 7):
                for how in (launch.STATS, launch.REDUCE, launch.APPLY, launch.ELEMENT):
                    cut = launch.plan(x, slice_size, how)
                    reach = cut.strips * cut.chunks * cut.tile[0]
                    assert reach >= cut.per_slice > (cut.strips - 1) * cut.chunks * cut.tile[0]
                    assert cut.rows * cut.per_slice >= cut.samples
                    assert cut.tile[0] * cut.tile[1] <= max(launch.TILE, launch.FUSED)
                    assert not cut.fused or cut.strips == cut.chunks == 1
                    assert cut.chunks <= launch.MOST_CHUNKS
                    assert cut.programs < 2**31
