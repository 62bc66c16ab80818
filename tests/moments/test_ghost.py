"""Ghost batches: each slice by its own statistics, one update of the buffers, evaluation as ever."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.functional import batch_norm
from tests.oracle import close, truth


@given(st.integers(2, 13), st.integers(1, 14), st.sampled_from([(), (3,), (2, 4)]))
def test_each_slice_is_normalized_apart(samples, ghost, spatial):
    x = torch.randn(samples, 3, *spatial)
    if min(samples, ghost) * x[0, 0].numel() == 1:
        return
    g = torch.randn_like(x)
    layer = BatchNorm1d(3, ghost_batch_size=ghost) if len(spatial) < 2 else BatchNorm2d(3, ghost_batch_size=ghost)
    leaf = x.clone().requires_grad_()
    want = truth(x, layer.weight, layer.bias, grad_output=g, slice_size=ghost)
    out = layer(leaf)
    out.backward(g)
    close(out, want.out, torch.float32)
    scale = g.abs().max().item() * (want.var + 1e-5).rsqrt().max().item()
    close(leaf.grad, want.grads["input"], torch.float32, 4, terms=scale)


def test_one_update_at_m_and_not_k_at_m_over_k():
    layer = BatchNorm1d(2, ghost_batch_size=4)
    x = torch.randn(16, 2) * 3 + 1
    layer(x)
    slices = x.split(4)
    mean = torch.stack([s.mean(0) for s in slices]).mean(0)
    var = torch.stack([s.var(0) for s in slices]).mean(0)  # equal slices: the pooled variance is their average
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var)
    assert layer.num_batches_tracked == 1


def test_an_uneven_last_slice_weighs_what_it_holds():
    layer = BatchNorm1d(2, ghost_batch_size=4, momentum=1.0)
    x = torch.randn(9, 2, dtype=torch.float64).float()
    layer(x)
    within = sum((s - s.mean(0)).square().sum(0) for s in x.split(4))
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, within / (3 + 3 + 0))


def test_evaluation_and_state_dict_know_nothing_of_it():
    ghost, plain = BatchNorm1d(3, ghost_batch_size=2).eval(), nn.BatchNorm1d(3).eval()
    x = torch.randn(5, 3)
    torch.testing.assert_close(ghost(x), plain(x))
    assert list(ghost.state_dict()) == list(plain.state_dict())


def test_a_slice_as_large_as_the_batch_is_the_plain_layer():
    x = torch.randn(8, 3)
    assert torch.equal(BatchNorm1d(3, ghost_batch_size=8)(x), BatchNorm1d(3)(x))


@pytest.mark.parametrize("size", [0, -1, 2.5, "8"])
def test_refused_at_construction(size):
    with pytest.raises(ValueError, match="ghost_batch_size"):
        BatchNorm1d(3, ghost_batch_size=size)


def test_slices_of_one_value_are_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm1d(3, ghost_batch_size=1)(torch.randn(4, 3))
    assert batch_norm(torch.randn(4, 3, 2), None, None, training=True, ghost_batch_size=1).shape == (4, 3, 2)
