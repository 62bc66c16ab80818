"""The backend "batchnorm": what it recognizes, what it must not touch, and that the numbers are eager's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.errors import UserError
from batchnorm.functional import batch_norm
from batchnorm.model_tools.fuse import backend, fuse, fuse_graph


class Net(nn.Module):
    """Two convolutions and normalizations, and `tail(net, first, second)` that ends the forward."""

    def __init__(self, tail) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.norm, self.other):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.act = nn.ReLU(inplace=True)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, x)


def run(tail, training: bool = True, sizes: tuple[int, ...] = (4,)) -> list:
    """Compiles with the fusing, holds outputs, gradients and buffers against eager, and returns the fused calls."""
    model = Net(tail).double().train(training)
    eager, calls = copy.deepcopy(model), []

    def watching(gm, example_inputs):
        fuse_graph(gm)
        calls.append([node for node in gm.graph.nodes if node.target is batch_norm])
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=watching)
    generator = torch.Generator().manual_seed(2)
    for size in sizes:
        x = torch.randn(size, 3, 5, 5, generator=generator, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        ours, theirs = compiled(inputs[0]), eager(inputs[1])
        torch.testing.assert_close(ours, theirs)
        grad = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
        ours.backward(grad)
        theirs.backward(grad)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    return calls


def words(calls: list) -> list[tuple[str, bool]]:
    return [(node.kwargs.get("activation", ""), "residual" in node.kwargs) for node in calls[0]]


ACTIVATIONS = {
    "module": (lambda m, y: m.act(y), "relu"),
    "function": (lambda m, y: F.relu(y), "relu"),
    "method in place": (lambda m, y: y.relu_(), "relu"),
    "torch.relu": (lambda m, y: torch.relu(y), "relu"),
    "relu6": (lambda m, y: F.relu6(y), "relu6"),
    "nn.ReLU6": (lambda m, y: nn.ReLU6(inplace=True)(y), "relu6"),
    "hardtanh": (lambda m, y: F.hardtanh(y, 0.0, 6.0), "relu6"),
    "leaky": (lambda m, y: F.leaky_relu(y, 0.25), "leaky_relu"),
    "silu": (lambda m, y: F.silu(y, inplace=True), "silu"),
    "silu written out": (lambda m, y: y * torch.sigmoid(y), "silu"),
    "silu written out, sigmoid first": (lambda m, y: y.sigmoid() * y, "silu"),
    "hardswish": (lambda m, y: F.hardswish(y), "hardswish"),
    "hardswish written out": (lambda m, y: y * F.relu6(y + 3) / 6, "hardswish"),
    "hardswish written out, gate divided": (lambda m, y: y * (F.relu6(y + 3) / 6), "hardswish"),
    "threshold": (lambda m, y: F.threshold(y, 0, 0), "relu"),
    "sigmoid": (lambda m, y: y.sigmoid(), "sigmoid"),
    "tanh": (lambda m, y: torch.tanh(y), "tanh"),
    "behind a view": (lambda m, y: y.flatten(2).transpose(1, 2).relu(), ""),
    "behind a view, in place": (lambda m, y: y.flatten(2).relu_() + 1, "relu"),
    "behind a view, written out": (lambda m, y: (v := y.transpose(1, 3)) * v.sigmoid(), "silu"),
    "behind a movedim": (lambda m, y: y.movedim(1, -1).tanh(), "tanh"),
    "behind a copy": (lambda m, y: y.clone().relu_(), "relu"),
    "behind a view that is read twice": (lambda m, y: (v := y.flatten(2)).relu() + v, ""),
    "behind a view that is written": (lambda m, y: (v := y.flatten(2), v.mul_(2), v.relu())[2], ""),
    # None of these is one of ours, or has its derivative (torch's hardsigmoid takes 1/6 in float32):
    "hardswish by hardsigmoid": (lambda m, y: y * F.hardsigmoid(y), ""),
    "hardtanh of its own": (lambda m, y: F.hardtanh(y), ""),
    "gelu": (lambda m, y: F.gelu(y), ""),
    "clamp": (lambda m, y: y.clamp(min=0), ""),
    "other gate": (lambda m, y: y * F.relu6(y + 2) / 6, ""),
    "read twice": (lambda m, y: y.relu() + y, ""),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_however_they_are_written(kind):
    act, word = ACTIVATIONS[kind]
    calls = run(lambda m, x: act(m, m.norm(m.conv(x))))
    assert words(calls) == [(word, False)]


CLAMPS = {
    "clamp_min": (lambda m, y: y.clamp_min(0), "relu"),
    "clamp": (lambda m, y: torch.clamp(y, min=0), "relu"),
    "clamp to 6": (lambda m, y: y.clamp_(0, 6), "relu6"),
    "clamp to 5": (lambda m, y: y.clamp(0, 5), ""),
    "clamp_max": (lambda m, y: y.clamp_max(6), ""),
}


@pytest.mark.parametrize("kind", CLAMPS)
@pytest.mark.parametrize("training", [True, False])
def test_a_clamp_is_an_activation_only_where_no_gradient_is_wanted(kind, training):
    act, word = CLAMPS[kind]

    def tail(m: Net, x: Tensor) -> Tensor:
        return act(m, m.norm(m.conv(x)))

    model, calls, x = Net(tail).double().train(training), [], torch.randn(4, 3, 5, 5).double()
    eager = copy.deepcopy(model)

    def watching(gm, example_inputs):
        fuse_graph(gm)
        calls.append([node.kwargs.get("activation", "") for node in gm.graph.nodes if node.target is batch_norm])
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=watching)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(compiled(x), eager(x))
    assert calls == [[word], [""]]


def in_place(m: Net, x: Tensor) -> Tensor:
    out = m.norm(m.conv(x))
    out += m.other(m.down(x))
    return m.act(out)


def into_the_shortcut(m: Net, x: Tensor) -> Tensor:
    shortcut = m.down(x)
    shortcut += m.norm(m.conv(x))
    return shortcut.relu()


def residual_written_before(m: Net, x: Tensor) -> Tensor:
    shortcut = m.down(x)
    out = m.norm(m.conv(x))
    shortcut.mul_(2)
    return F.relu(out + shortcut)


def residual_written_after(m: Net, x: Tensor) -> Tensor:
    shortcut = m.down(x)
    y = F.relu(m.norm(m.conv(x)) + shortcut)
    return y * 2 + shortcut.add_(1)


def statistics_read_between(m: Net, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.conv(x)) + m.norm(m.down(x)))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (lambda m, x: F.relu(m.norm(m.conv(x)) + m.down(x)), [("relu", True)]),
        (lambda m, x: torch.add(m.down(x), m.norm(m.conv(x))).relu(), [("relu", True)]),
        (lambda m, x: m.norm(m.conv(x)).add_(m.down(x)), [("", True)]),
        (in_place, [("", False), ("relu", True)]),
        (into_the_shortcut, [("", False)]),
        (residual_written_after, [("", False)]),
        (statistics_read_between, [("", False), ("relu", True)]),
        (lambda m, x: F.relu(m.norm(m.conv(x)) + 1), [("", False)]),
        (lambda m, x: F.relu(torch.add(m.norm(m.conv(x)), m.down(x), alpha=2)), [("", False)]),
        (lambda m, x: F.relu(m.norm(m.conv(x)) + m.down(x).mean((2, 3), True)), [("", False)]),
        (lambda m, x: (y := m.norm(m.conv(x))) + y, [("", False)]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_residuals_and_what_forbids_them(tail, expected, training):
    assert sorted(words(run(tail, training))) == expected


def whole(h: Tensor) -> None:
    h += 1


def part(h: Tensor) -> None:
    h[0] = 7


@pytest.mark.parametrize("write", [whole, part, lambda h: h.add_(1), lambda h: torch.add(h, 1, out=h)])
def test_an_input_that_is_written_before_the_addition_was_read_before_it(write):
    def tail(m: Net, x: Tensor) -> Tensor:
        h = m.conv(x)
        out = m.norm(h)
        write(h)
        return (out + m.down(x)).relu()

    model, x = Net(tail).double(), torch.randn(4, 3, 5, 5).double()
    expected = copy.deepcopy(model)
    torch._dynamo.reset()
    with torch.no_grad():  # autograd refuses the write
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected(x))


def test_a_residual_that_is_written_before_the_addition_is_read_after_it():
    assert words(run(residual_written_before)) == [("relu", True)]


def test_torch_batch_norm_and_missing_parts():
    def tail(m: Net, x: Tensor) -> Tensor:
        h = torch.batch_norm(m.conv(x), m.norm.weight, m.norm.bias, None, None, True, 0.1, 1e-3, False)
        return F.batch_norm(h, None, None, training=True).tanh()

    assert words(run(tail)) == [("", False), ("tanh", False)]


def test_a_new_batch_size_compiles_once_more_and_then_no_more():
    assert len(run(in_place, sizes=(4, 6, 3, 8, 5))) <= 2


def test_graphs_inside_the_graph_are_fused_too():
    def tail(m: Net, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda t: m.act(m.norm(m.conv(t))), x, use_reentrant=False)

    counts = []

    def watching(gm, example_inputs):
        counts.append(fuse_graph(gm))
        return gm.forward

    model, x = Net(tail).eval(), torch.randn(4, 3, 5, 5)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend=watching)(x), model(x))
    assert counts == [1]


@pytest.mark.parametrize("rest", ["eager", "aot_eager", lambda gm, inputs: gm.forward])
def test_what_is_left_goes_to_another_backend(rest):
    model, x = Net(in_place).double(), torch.randn(4, 3, 5, 5).double()
    expected = copy.deepcopy(model)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(fuse(model, rest=rest)(x), expected)


def test_our_own_layers_compile_and_the_model_stays():
    from batchnorm.model_tools import convert

    model, x = convert(Net(in_place).double()), torch.randn(4, 3, 5, 5).double()
    before, expected = repr(model), copy.deepcopy(model)(x)
    torch._dynamo.reset()
    compiled = fuse(model)
    torch.testing.assert_close(compiled(x), expected)
    assert repr(model) == before


def test_the_backend_is_known_by_name():
    model, x = Net(in_place), torch.randn(4, 3, 5, 5)
    expected = copy.deepcopy(model)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="batchnorm")(x), expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.lookup_backend("batchnorm") is backend


def test_an_unknown_option_is_refused():
    with pytest.raises(UserError, match="'speed'"):
        fuse(nn.Linear(2, 2), speed=11)
