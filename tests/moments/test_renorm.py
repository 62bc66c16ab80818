"""Batch renormalization against its paper's formula, written out."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm1d, BatchNorm2d, Renorm
from batchnorm.functional import batch_norm
from tests.oracle import close


def formula(x, weight, bias, mean, var, r_max, d_max, eps=1e-5):
    """Equations of arXiv 1702.03275, section 3, in float64; r and d are constants."""
    dims = [0, *range(2, x.dim())]
    shape = (1, -1, *(1,) * (x.dim() - 2))
    mu, sigma = x.mean(dims), (x.var(dims, correction=0) + eps).sqrt()
    running = (var.double() + eps).sqrt()
    r = (sigma / running).clamp(1 / r_max, r_max).detach()
    d = ((mu - mean.double()) / running).clamp(-d_max, d_max).detach()
    hat = (x - mu.view(shape)) / sigma.view(shape) * r.view(shape) + d.view(shape)
    return hat * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (1.2, 0.3), (3.0, 5.0), (100.0, 100.0)])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (3, 3, 2, 4)])
def test_the_papers_formula(bounds, shape):
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).requires_grad_()
    g = torch.randn_like(x)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    want = formula(x, weight, bias, mean, var, *bounds)
    wanted = torch.autograd.grad(want, (x, weight, bias), g)
    out = batch_norm(x, mean, var, weight, bias, True, renorm=Renorm(*bounds))
    found = torch.autograd.grad(out, (x, weight, bias), g)
    close(out, want.detach(), torch.float64, 10)
    for a, b in zip(found, wanted, strict=True):
        close(a, b, torch.float64, 100, terms=1.0)


def test_bounds_of_one_and_zero_are_batch_normalization():
    x = torch.randn(8, 3)
    plain, renorm = BatchNorm1d(3), BatchNorm1d(3, renorm=Renorm(1.0, 0.0))
    torch.testing.assert_close(renorm(x), plain(x))
    for a, b in zip(plain.buffers(), renorm.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_normalizes_as_evaluation_where_the_bounds_allow():
    layer = BatchNorm1d(3, renorm=Renorm(100.0, 100.0))
    x = torch.randn(16, 3)
    evaluated = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), evaluated)


def test_the_schedule():
    schedule = Renorm.paper()
    for step, r_max, d_max in [(0, 1, 0), (5_000, 1, 0), (15_000, 1 + 2 * 10 / 35, 2.5), (40_000, 3, 5), (10**6, 3, 5)]:
        found = schedule.bounds(torch.tensor(step))
        assert [float(b) for b in found] == pytest.approx([r_max, d_max])
    assert Renorm(2.0, 1.0).bounds(None) == (2.0, 1.0)
    layer = BatchNorm1d(3, renorm=Renorm(3.0, 5.0, (2, 4), (2, 4)))
    plain = BatchNorm1d(3)
    for step in range(4):  # two steps of plain normalization, then corrections
        x = torch.randn(16, 3) * 3 + 2
        same = torch.allclose(layer(x), plain(x), atol=1e-5)
        assert same == (step < 3)
    assert list(layer.state_dict()) == list(plain.state_dict())


def test_second_order():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(2).double(), torch.rand(2).double() + 0.5

    def f(x):
        # r and d are constants to the gradient, which a finite difference does not know: hold them by tight bounds
        return batch_norm(x, mean.clone(), var.clone(), training=True, renorm=Renorm(1.0, 1e-9))

    assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_sees_the_same_reference_twice(use_reentrant):
    layer = BatchNorm1d(3, renorm=Renorm(3.0, 5.0))
    again = copy.deepcopy(layer)
    x, g = torch.randn(8, 3) * 2 + 1, torch.randn(8, 3)
    grads = []
    for module, run in (
        (layer, lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant)),
        (again, lambda m, x: m(x)),
    ):
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            run(module, leaf).backward(g)
        grads.append((leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_of_two_forwards_before_their_backward(use_reentrant, masked):
    """Real and fake batches of one step: each is recomputed against what it saw, not against what moved since."""
    layer = BatchNorm1d(3, renorm=Renorm(1.5, 0.5))
    again = copy.deepcopy(layer)
    batches = [torch.randn(8, 3) * k + k for k in (1, 3, 2)]
    mask = torch.tensor([True] * 6 + [False] * 2) if masked else None
    g, grads = torch.randn(8, 3), []
    for run in (
        lambda x: checkpoint(layer, x, mask, use_reentrant=use_reentrant),
        lambda x: again(x, mask),
    ):
        leaves = [x.clone().requires_grad_() for x in batches]
        (torch.cat([run(x) for x in leaves]) * g.repeat(3, 1)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(layer.state_dict(), again.state_dict())


def test_a_fresh_layer_is_bounded_and_the_schedule_lets_it_settle():
    """Buffers of 0 and 1 say nothing of data at 100: r and d are clipped until the buffers have come near."""
    x = torch.randn(64, 3) + 100
    torch.testing.assert_close(BatchNorm1d(3, renorm=Renorm(3.0, 5.0))(x).mean(0), torch.full((3,), 5.0))
    layer = BatchNorm1d(3, renorm=Renorm(3.0, 5.0, (100, 200), (100, 200)))
    for _ in range(100):
        layer(torch.randn(64, 3) + 100)
    trained = layer(x)
    assert (layer.eval()(x) - trained).abs().max() < 0.5
    assert trained.mean().abs() < 0.01


@pytest.mark.parametrize(
    "arguments", [(0.5, 1.0), (2.0, -1.0), (float("nan"), 1.0), (2.0, 1.0, (5, 5)), (2.0, 1.0, None, (-1, 3))]
)
def test_bounds_that_cannot_be(arguments):
    with pytest.raises(ValueError, match="Renorm"):
        Renorm(*arguments)


def test_refused_at_construction():
    with pytest.raises(ValueError, match="track_running_stats"):
        BatchNorm2d(3, track_running_stats=False, renorm=Renorm())
    with pytest.raises(ValueError, match="renorm must be"):
        BatchNorm2d(3, renorm=3.0)
    with pytest.raises(ValueError, match="running"):
        batch_norm(torch.randn(4, 3), None, None, training=True, renorm=Renorm())
