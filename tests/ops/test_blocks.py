"""The memory of large outputs: reused, never shared by two living tensors, given back when asked."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm.ops import extension

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="the extension was not built here")

SHAPE = (8, 32, 40, 40)  # 1.6 MB


def normalized(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    return torch.ops.batchnorm.forward(x, None, None, None, None, 1e-5, "", 0.0, 0)[0]


def test_a_freed_output_serves_the_next() -> None:
    batchnorm.empty_cache()
    first = normalized(0)
    address = first.data_ptr()
    del first
    gc.collect()
    assert normalized(1).data_ptr() == address


def test_living_outputs_never_share_memory() -> None:
    outputs = [normalized(seed) for seed in range(6)]
    views = [outputs.pop(0)[1:3, :, ::2].transpose(0, 1) for _ in range(2)]  # the views keep their blocks
    later = [normalized(seed) for seed in range(6, 9)]
    for seed, out in zip((2, 3, 4, 5, 6, 7, 8), (*outputs, *later), strict=True):
        assert torch.equal(out, normalized(seed))
    for seed, view in enumerate(views):
        assert torch.equal(view, normalized(seed)[1:3, :, ::2].transpose(0, 1))
    blocks = {out.data_ptr() for out in (*outputs, *later)}
    assert len(blocks) == 7


def test_empty_cache_gives_idle_memory_back_and_leaves_the_living() -> None:
    batchnorm.empty_cache()
    living, dead = normalized(0), normalized(1)
    want, size = living.clone(), dead.numel() * 4
    del dead
    assert size <= batchnorm.empty_cache() < 2 * size
    assert batchnorm.empty_cache() == 0
    assert torch.equal(living, want)


def test_blocks_are_freed_in_any_thread() -> None:
    wrong: list[int] = []

    def work(first: int) -> None:
        wrong.extend(seed for seed in range(first, first + 8) if not torch.equal(normalized(seed), expected[seed]))

    expected = [normalized(seed).clone() for seed in range(24)]
    threads = [threading.Thread(target=work, args=(8 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_blocks_of_its_own() -> None:
    out = normalized(0)
    want = out.clone()
    del out  # idle in both processes: the child writes to its copy
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        batchnorm.empty_cache()
        os.write(writer, b"k")
        os._exit(0)
    assert os.read(reader, 1) == b"k"
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert torch.equal(normalized(0), want)
