"""Outputs computed again: once for all, in every kind of backward, and never from what was changed."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from .nets import Own, X, both, chain, gradients, same


def test_retain_graph_and_a_backward_that_reaches_the_consumer_alone():
    plain, saving = both(chain(nn.ReLU(), nn.SiLU(), nn.Tanh()))
    g = torch.randn(4, 2, 3, 2)
    results = []
    for model in (plain, saving):
        out = model(X)
        last = [model[3].weight, model[6].weight]
        first = torch.autograd.grad(out, last, g, retain_graph=True)
        results.append([*first, *torch.autograd.grad(out, list(model.parameters()), g, retain_graph=True)])
        out.backward(g)
        results[-1] += [p.grad for p in model.parameters()]
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.backward(g)
    same(*results)


def test_a_consumer_s_backward_after_the_normalization_s():
    """The first loss's backward frees what the normalization kept, and the second asks for a convolution's weight."""
    results = []
    for model in both(Own(F.relu)):
        y = F.relu(model.bn1(model.conv1(X)))
        a, b = model.bn2(model.conv2(y)), model.bn2(model.conv2(y))
        del y
        a.sin().sum().backward()
        results.append(torch.autograd.grad(b.sin().sum(), model.conv2.weight))
    same(*results)


def test_double_backward():
    results = []
    for model in both(chain(nn.SiLU(), nn.Tanh()).double()):
        x = X.double().requires_grad_()
        (gx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gx.square().sum(), [x, *model.parameters()], allow_unused=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_functional_transforms_and_no_grad():
    plain, saving = both(chain(nn.SiLU(), nn.Tanh()).double().eval())
    x = X.double()
    found = []
    for model in (plain, saving):
        parameters = dict(model.named_parameters())
        one = grad(lambda p, x, model=model: functional_call(model, p, (x[None],)).sin().sum())
        found.append([*vmap(one, (None, 0))(parameters, x).values()])
        with torch.no_grad():
            found[-1].append(model(x))
    same(*found)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_the_partitioner_decides(backend):
    torch._dynamo.reset()
    plain, saving = both(chain(nn.SiLU(), nn.ReLU()))
    want = gradients(plain, X)
    compiled = torch.compile(saving, backend=backend, fullgraph=True)
    for a, b in zip(gradients(compiled, X)[:-6], want[:-6], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


MODIFIED = (
    r"^bn1 \(BatchNorm2d\(4\)\): one of the variables needed for gradient computation has been modified by an inpl"
)


def after(net, act, change, between=False):
    """A step of `net`, in which something is changed in place between convolution and output, or after both."""
    held = {}

    def acting(z):
        held["z"] = z
        held["y"] = act(z)
        if between:
            change(net, held)
        return held["y"]

    net.act = acting
    net.conv1.register_forward_hook(lambda m, given, out: held.__setitem__("x", out))
    out = net(X)
    if not between:
        change(net, held)
    return out


@torch.no_grad()
def add(tensor):
    tensor.add_(1)


CHANGES = {
    "output": lambda net, held: add(held["y"]),
    "a view of it": lambda net, held: add(held["y"][1:]),
    "a detached output": lambda net, held: held["y"].detach().mul_(2),
    "input": lambda net, held: (held.pop("y"), held.pop("z"), add(held["x"])),
    "weight": lambda net, held: (held.pop("y"), held.pop("z"), add(net.bn1.weight)),
    "bias": lambda net, held: (held.pop("y"), held.pop("z"), add(net.bn1.bias)),
    "an output that is no more": lambda net, held: (add(held["y"]), held.clear()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("act", [lambda z: z, F.silu, F.relu, F.relu_], ids=["none", "silu", "relu", "relu in place"])
def test_a_change_after_it_was_saved_is_torch_s_error_with_the_layer_s_name(change, act):
    _, saving = both(Own(act))
    out = after(saving, act, CHANGES[change])
    with pytest.raises(RuntimeError, match=MODIFIED) as raised:
        torch.autograd.grad(out.sum(), saving.conv2.weight)
    assert "\n" not in str(raised.value)


BETWEEN = {
    "output": lambda net, held: add(held["y"]),
    "output of the norm": lambda net, held: add(held["z"]),
    "recorded": lambda net, held: held.__setitem__("y", held["y"].mul_(0.5)),
    "through a view": lambda net, held: held["y"][:, 0].zero_() if held["y"]._version else add(held["y"][:, 0]),
}


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("act", [lambda z: z, F.silu, F.relu_, F.softplus], ids=["none", "silu", "relu_", "softplus"])
def test_a_change_before_it_is_saved_is_in_the_gradient(change, act):
    """Where torch refuses the backward, so does this; else both see the changed tensor."""
    plain, saving = both(Own(act))
    try:
        want = gradients_of(plain, act, BETWEEN[change])
    except RuntimeError:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients_of(saving, act, BETWEEN[change])
        return
    same(gradients_of(saving, act, BETWEEN[change]), want)


def gradients_of(model, act, change):
    out = after(model, act, change, between=True)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)))
    return [p.grad for p in model.parameters()]


def test_a_change_to_the_norm_s_output_between_norm_and_activation():
    """ReLU keeps its result alone, so nothing that is saved shows the change."""
    for act in (F.relu, F.relu_, torch.sigmoid, lambda z: z.to(torch.float64).float()):
        results = []
        for model in both(Own(None)):
            model.act = lambda z, act=act: (add(z), act(z))[1]
            results.append(gradients(model, X))
        same(*results)


def test_a_change_to_what_the_activation_read_does_not_reach_what_it_gave():
    """A convolution's weight needs the activation's output alone, which the change of its input left as it was."""
    results = []
    for model in both(Own(None)):
        held = {}
        out = after(model, F.silu, lambda net, values, held=held: (held.update(z=values["z"]), values.clear()))
        add(held["z"])
        results.append(torch.autograd.grad(out.sin().sum(), model.conv2.weight))
    same(*results)
