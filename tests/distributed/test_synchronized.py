"""Synchronized statistics between real processes: torchrun, gloo, loopback."""

import pytest
import torch

from batchnorm import BatchNorm1d
from tests.distributed.launch import torchrun


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_all_ranks_together_are_one_process(world):
    assert "checks on" in torchrun("tests.distributed.sync_worker", world)


def test_a_rank_that_leaves_is_an_error_that_names_the_layer():
    out = torchrun("tests.distributed.failing_worker", 2)
    assert "rank 0: 1 (BatchNorm1d(3)): synchronized batch norm failed" in out


def test_one_process_alone_is_the_plain_layer():
    x = torch.randn(4, 3)
    assert torch.equal(BatchNorm1d(3, process_group="world")(x), BatchNorm1d(3)(x))


def test_what_is_no_group_is_refused():
    with pytest.raises(ValueError, match="process_group must be"):
        BatchNorm1d(3, process_group=3)
    with pytest.raises(RuntimeError, match="not initialized"):
        BatchNorm1d(3, process_group="some group")(torch.randn(4, 3))
