"""Masked statistics: padding takes no part, may hold anything, and is still normalized."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNormAct1d, BatchNormAct2d, Renorm, lengths_to_mask
from batchnorm.functional import batch_norm
from batchnorm.moments import flat_mask
from tests.oracle import close, truth


def test_real_positions_are_as_without_the_padding():
    lengths = torch.tensor([7, 3, 5, 1])
    mask = lengths_to_mask(lengths, 7)
    x, g = torch.randn(4, 3, 7), torch.randn(4, 3, 7)
    padded = torch.where(mask.unsqueeze(1), x, float("nan"))
    layer, packed = BatchNormAct1d(3, "silu"), BatchNormAct1d(3, "silu")
    leaf = padded.clone().requires_grad_()
    out = layer(leaf, mask=mask)
    out.backward(torch.where(mask.unsqueeze(1), g, 0.0))

    def real(t):
        return t.transpose(1, 2)[mask]

    rows = real(x).clone().requires_grad_()
    want = packed(rows)
    want.backward(real(g))
    torch.testing.assert_close(real(out), want)
    torch.testing.assert_close(real(leaf.grad), rows.grad)
    assert leaf.grad.isfinite().all()
    for ours, theirs in zip(layer.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(layer.buffers(), packed.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(["", "relu", "tanh"]), st.sampled_from([0, 2]))
def test_any_mask_is_the_truth(samples, seed, activation, slice_size):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(samples, 3, 2, 5, generator=generator) for _ in range(2))
    mask = torch.rand(samples, 2, 5, generator=generator) < 0.6
    want = truth(x, grad_output=g, mask=mask.flatten(1), activation=activation, slice_size=slice_size)
    leaf = x.clone().requires_grad_()
    out = batch_norm(
        leaf, None, None, training=True, mask=mask, activation=activation or None, ghost_batch_size=slice_size or None
    )
    out.backward(g)
    close(out, want.out, torch.float32)
    scale = g.abs().max().item() * (want.var + 1e-5).rsqrt().max().item()
    close(leaf.grad, want.grads["input"], torch.float32, 10, terms=scale)


def test_gradcheck_with_finite_padding():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = lengths_to_mask(torch.tensor([4, 2, 3]), 4)

    def f(x):
        return batch_norm(x, None, None, training=True, mask=mask, activation="tanh")

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize(
    "shape", [(4, 5, 6), (4, 1, 5, 6), (1, 5, 6), (4, 1, 1, 6), (4, 5, 1), (5, 6), (6,), (4, 1, 1, 1)]
)
def test_shapes_that_broadcast(shape):
    x, mask = torch.randn(4, 3, 5, 6), torch.rand(shape) < 0.5
    full = mask if mask.dim() == 4 else mask.reshape((1,) * (3 - mask.dim()) + shape).unsqueeze(1)
    assert torch.equal(flat_mask(mask, x), full.expand(4, 1, 5, 6).flatten(1))


def test_fully_connected():
    x, mask = torch.randn(6, 3), torch.tensor([True, True, False, True, False, True])
    for form in (mask, mask.unsqueeze(1)):
        layer = BatchNorm1d(3, momentum=1.0)
        layer(x, mask=form)
        torch.testing.assert_close(layer.running_mean, x[mask].mean(0))
        torch.testing.assert_close(layer.running_var, x[mask].var(0))


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 6, 5), (3, 5, 6), (4, 5, 6, 1), (2, 4, 1, 5, 6)])
def test_shapes_that_do_not_fit(shape):
    layer = BatchNorm2d(3)
    with pytest.raises(ValueError, match="mask of shape"):
        layer(torch.randn(4, 3, 5, 6), mask=torch.ones(shape, dtype=torch.bool))
    assert layer.num_batches_tracked == 0


def test_only_bool():
    with pytest.raises(ValueError, match="mask must be bool"):
        BatchNorm1d(3)(torch.randn(4, 3), mask=torch.ones(4))


def test_nothing_real_moves_nothing():
    layer = BatchNorm1d(3)
    out = layer(torch.full((4, 3), float("nan")), mask=torch.zeros(4, dtype=torch.bool))
    assert out.isnan().all()
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("keywords", [{}, {"ghost_batch_size": 2}, {"renorm": Renorm(1.5, 0.3)}, {"domains": 2}])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_padding_may_hold_anything_whatever_gradient_comes_back(keywords, kind):
    """Padding of NaN with a gradient that is NaN there too: all that is real is as if the padding held zeros."""
    mask = torch.rand(5, 4, 6) < 0.6
    mask[3] = False  # a sample of padding alone
    x, g = torch.randn(5, 3, 4, 6), torch.randn(5, 3, 4, 6)
    padding = ~mask.unsqueeze(1).expand_as(x)
    found = []
    for filling in (float(kind), 0.0):
        torch.manual_seed(1)
        layer = BatchNormAct2d(3, "silu", **keywords)
        leaf = x.masked_fill(padding, filling).requires_grad_()
        out = layer(leaf, mask=mask)
        back = g.masked_fill(padding, float("nan") if filling else 0.0)
        out.backward(back)
        found.append((out[~padding], leaf.grad[~padding], *(p.grad for p in layer.parameters()), *layer.buffers()))
        assert leaf.grad.isfinite().all()
    torch.testing.assert_close(*found)


def test_padding_that_is_not_finite_under_transforms_and_second_order():
    mask = lengths_to_mask(torch.tensor([5, 2, 0, 4]), 5)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    padding = ~mask.unsqueeze(1).expand_as(x)
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss(x):
        out = batch_norm(x, None, None, weight, training=True, mask=mask, activation="silu")
        return out.masked_fill(padding, 0.0).pow(3).sum()

    values = []
    for filling in (float("nan"), 0.0):
        leaf = x.masked_fill(padding, filling).requires_grad_()
        first = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
        second = torch.autograd.grad(first.masked_fill(padding, 0.0).pow(2).sum(), (leaf, weight))
        values.append((first, torch.func.grad(loss)(leaf.detach()), *second))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b)


def test_a_slice_of_padding_alone_is_no_slice():
    x, mask = torch.randn(6, 3, 4), torch.ones(6, 4, dtype=torch.bool)
    mask[2:4] = False
    layer, without = (BatchNorm1d(3, ghost_batch_size=2, momentum=1.0) for _ in range(2))
    leaf = x.clone().requires_grad_()
    out = layer(leaf, mask=mask)
    indices = torch.tensor([0, 1, 4, 5])
    torch.testing.assert_close(out[indices], without(x[indices]))
    torch.testing.assert_close(layer.state_dict(), without.state_dict())
    out.backward(torch.randn_like(out))
    assert leaf.grad.isfinite().all()


def test_evaluation_ignores_the_mask():
    layer, x = BatchNorm1d(3).eval(), torch.randn(4, 3)
    assert torch.equal(layer(x, mask=torch.tensor([True, False, True, True])), layer(x))


def test_lengths():
    assert lengths_to_mask(torch.tensor([0, 2, 3]), 3).tolist() == [
        [False, False, False],
        [True, True, False],
        [True, True, True],
    ]
    for wrong in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([True])):
        with pytest.raises(ValueError, match="lengths"):
            lengths_to_mask(wrong, 3)
