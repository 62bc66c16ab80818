"""Derivatives of any order and any nest of modes, against the same function written in torch's elementary operators."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

from batchnorm import BatchNorm1d
from batchnorm.functional import batch_norm

torch.manual_seed(0)
X, T, MEAN, WEIGHT, BIAS = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (5, 3), (3,), (3,), (3,)))
VAR = torch.rand(3, dtype=torch.float64) + 0.5


def written_out(training, act):
    def f(x):
        mean, var = (x.mean(0), x.var(0, unbiased=False)) if training else (MEAN, VAR)
        return torch.sin(act((x - mean) / (var + 1e-5).sqrt() * WEIGHT + BIAS)).sum()

    return f


def ours(training, **keywords):
    def f(x):
        buffers = (MEAN.clone(), VAR.clone())
        return torch.sin(batch_norm(x, *buffers, WEIGHT, BIAS, training, 0.1, 1e-5, **keywords)).sum()

    return f


def tangent(f):
    return lambda x: jvp(f, (x,), (T,))[1]


def gradient_along_t(f):
    return lambda x: (grad(f)(x) * T).sum()


def dual_then_backward(f):
    x = X.clone().requires_grad_()
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, T))).tangent
    return torch.autograd.grad(out, x)[0]


def autograd_three_times(f):
    x = X.clone().requires_grad_()
    out = f(x)
    for _ in range(2):
        out = (torch.autograd.grad(out, x, create_graph=True)[0] * T).sum()
    return torch.autograd.grad(out, x)[0]


NESTS = {
    "forward": lambda f: tangent(f)(X),
    "forward over forward": lambda f: tangent(tangent(f))(X),
    "forward three times": lambda f: tangent(tangent(tangent(f)))(X),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f))(X),
    "forward over reverse": lambda f: hessian(f)(X),
    "reverse over forward": lambda f: jacrev(jacfwd(f))(X),
    "reverse over reverse": lambda f: jacrev(jacrev(f))(X),
    "reverse three times": lambda f: grad(gradient_along_t(gradient_along_t(f)))(X),
    "forward over forward, batched": lambda f: vmap(lambda s: tangent(lambda x: jvp(f, (x,), (s,))[1])(X))(
        torch.stack([T, -2 * T])
    ),
    "autograd over a dual level": dual_then_backward,
    "autograd three times": autograd_three_times,
}


@pytest.mark.parametrize("nest", list(NESTS))
@pytest.mark.parametrize("training", [True, False], ids=["training", "running"])
@pytest.mark.parametrize(
    ("keywords", "act"),
    [({}, lambda z: z), ({"activation": "silu"}, F.silu), ({"ghost_batch_size": 5}, lambda z: z)],
    ids=["plain", "activation", "ghost"],
)
def test_every_nest(nest, training, keywords, act):
    want = NESTS[nest](written_out(training, act))
    torch.testing.assert_close(NESTS[nest](ours(training, **keywords)), want, rtol=1e-10, atol=1e-10)


def test_the_buffers_move_once_where_derivatives_nest():
    buffers, wanted = (MEAN.clone(), VAR.clone()), (MEAN.clone(), VAR.clone())
    tangent(tangent(lambda x: batch_norm(x, *buffers, training=True).sum()))(X)
    F.batch_norm(X, *wanted, training=True)
    torch.testing.assert_close(buffers, wanted)


def test_a_layer_under_a_dual_level_trains_on():
    layer, theirs = BatchNorm1d(3).double(), torch.nn.BatchNorm1d(3).double()
    for module in (layer, theirs):
        with forward_ad.dual_level():
            module(forward_ad.make_dual(X, T))
    torch.testing.assert_close(layer.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 3, 1), (4, 3, 1, 5)])
def test_a_gradient_in_the_other_layout(shape, training):
    """Where an axis has size 1, torch 2.13 takes such a gradient for one in the input's layout, and is wrong."""
    n, c, h, w = shape
    x = torch.randn(shape, dtype=torch.float64)
    g = torch.randn(n, h, w, c, dtype=torch.float64).permute(0, 3, 1, 2)
    weight, bias = torch.randn(c, dtype=torch.float64), torch.randn(c, dtype=torch.float64)
    moments = (torch.randn(c, dtype=torch.float64), torch.rand(c, dtype=torch.float64) + 0.5)

    def written_out(x):
        mean, var = (x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)) if training else moments
        scale = weight / (var + 1e-5).sqrt()
        return (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)

    leaves = [x.clone().requires_grad_() for _ in range(2)]
    out = batch_norm(leaves[0], *(m.clone() for m in moments), weight, bias, training)
    got, want = torch.autograd.grad(out, leaves[0], g)[0], torch.autograd.grad(written_out(leaves[1]), leaves[1], g)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
