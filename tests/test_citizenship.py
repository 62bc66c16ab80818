"""PyTorch's machinery goes through our layers as through its own: compile, export, transforms, higher derivatives."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.functional import batch_norm
from tests.oracle import ACTIVATION, close


def net(**keywords):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), batchnorm.BatchNormAct2d(4, "relu", **keywords), nn.Flatten(), nn.Linear(144, 2)
    )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_without_a_graph_break(momentum):
    """momentum=None breaks torch's own layer out of the graph (it reads the counter on the host)."""
    eager = net(momentum=momentum)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        model.train(training)
        eager.train(training)
        x = torch.randn(5, 3, 8, 8)
        a, b = compiled(x), eager(x)
        assert torch.equal(a, b)
        g = torch.randn_like(a)
        for out, module in ((a, model), (b, eager)):
            module.zero_grad()
            out.backward(g)
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    for p, q in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(p, q)


def test_compile_with_a_dynamic_batch_and_a_mask():
    torch._dynamo.reset()  # of one forward only so many variants are kept: those of other tests count
    layer = batchnorm.BatchNorm2d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for samples in (8, 6, 9):
        x, mask = torch.randn(samples, 3, 8, 8), torch.rand(samples, 8, 8) > 0.3
        torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))


def test_compile_with_a_dynamic_batch():
    model = net()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for samples in (3, 5, 9):
        assert compiled(torch.randn(samples, 3, 8, 8)).shape == (samples, 2)


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_program_needs_nothing_of_ours(training):
    model = net().train(training)
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(model, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("batchnorm::" in target or target.startswith("batchnorm.") for target in targets)
    torch.testing.assert_close(program.module()(x), copy.deepcopy(model)(x))


def test_symbolic_trace():
    model = net().eval()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_jit_trace():
    model, x = net().eval(), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("activation", ["", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(activation, training):
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    buffers = (None, None) if training else (torch.zeros(3).double(), torch.ones(3).double())

    def f(x, w, b, r):
        return batch_norm(x, *buffers, w, b, training, activation=activation or None, residual=r)

    assert torch.autograd.gradcheck(f, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual))


def test_second_derivative_of_a_deeper_graph():
    """The input is itself computed: the second order must reach what made it."""
    model = nn.Sequential(nn.Linear(4, 5), batchnorm.BatchNormAct1d(5, "silu"), nn.Linear(5, 1)).double()
    plain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.SiLU(), nn.Linear(5, 1)).double()
    plain.load_state_dict({k.replace("2.", "3.").replace("norm.", ""): v for k, v in model.state_dict().items()})
    x, penalties = torch.randn(6, 4, dtype=torch.float64), []
    for module in (model, plain):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), list(module.parameters()), allow_unused=True))
    for a, b in zip(*penalties, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, torch.float64, 1e3, terms=1.0)


@pytest.mark.parametrize("activation", list(ACTIVATION))
def test_forward_mode(activation):
    x, t = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def f(x):
        return batch_norm(x, None, None, training=True, activation=activation or None)

    _, tangent = jvp(f, (x,), (t,))
    step = 1e-6
    numeric = (f(x + step * t) - f(x - step * t)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-6)


def test_vmap_and_jacrev():
    x = torch.randn(4, 6, 3, dtype=torch.float64)

    def f(x):
        return batch_norm(x, None, None, training=True)

    torch.testing.assert_close(vmap(f)(x), torch.stack([f(one) for one in x]))
    assert jacrev(f)(x[0]).shape == (6, 3, 6, 3)
    layer = batchnorm.BatchNorm1d(3).double().eval()
    state = dict(layer.state_dict())
    torch.testing.assert_close(vmap(lambda x: functional_call(layer, state, (x,)))(x), torch.stack([*map(layer, x)]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    layer, again = (batchnorm.BatchNormAct1d(3, "relu") for _ in range(2))
    x = torch.randn(8, 3, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    g = torch.randn(8, 3)
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(g)
    again(y).backward(g)
    torch.testing.assert_close(x.grad, y.grad)


def test_import_needs_torch_alone():
    """Nothing but torch and what torch brings is loaded, and no submodule that users did not ask for."""
    code = (
        "import sys, torch; before = set(sys.modules); import batchnorm;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - {'batchnorm'} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
