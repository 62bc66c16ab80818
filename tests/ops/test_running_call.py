"""The call with running statistics in C++: the bits of Python's, derivatives of any order, and when it serves."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNormAct2d, layer_call
from batchnorm.ops import FixedStatistics
from tests.ops.training import COMPILED
from tests.oracle import close, truth

pytestmark = pytest.mark.skipif(COMPILED is None, reason="csrc/autograd was not built against this torch")
FORM = (1e-5, "", 0.2)


def leaves(dtype=torch.float64, residual=True, affine=True):
    def random(*size):
        return torch.randn(size).to(dtype)

    made = [random(6, 3, 4, 5) * 2 + 1, random(3), random(3), random(6, 3, 4, 5)]
    given = (True, affine, affine, residual)
    return [t.requires_grad_() if keep else None for t, keep in zip(made, given, strict=True)]


def buffers(dtype=torch.float64):
    return torch.randn(3).to(dtype), (torch.rand(3) + 0.5).to(dtype)


def grads(out, tensors, g, **keywords):
    return torch.autograd.grad(out, [t for t in tensors if t is not None], g, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["", "relu", "silu", "leaky_relu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_the_bits_of_pythons(dtype, activation, residual, affine):
    tensors, held, form = leaves(dtype, residual, affine), buffers(dtype), (1e-5, activation, 0.2)
    g = torch.randn(6, 3, 4, 5).to(dtype)
    found = COMPILED.plain_running_call(*tensors, *held, *form)
    want = FixedStatistics.apply(*tensors, None, *held, *form)
    assert torch.equal(found, want)
    for a, b in zip(grads(found, tensors, g), grads(want, tensors, g), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(COMPILED.plain_running_call(*tensors, *held, *form), want)


@pytest.mark.parametrize("activation", ["", "silu", "tanh"])
def test_first_and_second_derivatives(activation):
    tensors, held = leaves(), buffers()

    def f(*tensors):
        return COMPILED.plain_running_call(*tensors, *held, 1e-5, activation, 0.2)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_buffers_that_move_later_do_not_spoil_an_earlier_backward():
    layer = BatchNormAct2d(3, "silu").eval()
    x, g = torch.randn(5, 3, 2, 2, requires_grad=True), torch.randn(5, 3, 2, 2)
    norm = layer.norm
    want = truth(
        x, norm.weight, norm.bias, grad_output=g, moments=(norm.running_mean, norm.running_var), activation="silu"
    )
    out = layer(x)
    norm.running_var.zero_()
    out.backward(g)
    close(x.grad, want.grads["input"], torch.float32, 4)


def test_a_saved_tensor_changed_in_place_is_noticed():
    tensors, held = leaves(), buffers()
    out = COMPILED.plain_running_call(*tensors, *held, *FORM)
    with torch.no_grad():
        tensors[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("state", ["eval", "frozen"])
def test_layers_come_through_it(state, monkeypatch):
    seen = []
    served = layer_call.plain_running_call
    monkeypatch.setattr(layer_call, "plain_running_call", lambda *a: seen.append(served(*a)) or seen[-1])
    layer = BatchNorm1d(3).train(state == "frozen")
    layer.frozen = state == "frozen"
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.randn(1, 3)).shape == (1, 3)  # one value is enough
    assert seen[0] is not None
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_what_is_not_plain_is_left_to_python():
    x, (mean, var) = torch.randn(4, 3), buffers(torch.float32)
    good = (x, None, None, None, mean, var, 1e-5, "", 0.01)
    assert COMPILED.plain_running_call(*good) is not None
    for index, odd in (
        (0, torch.randn(3)),
        (0, x.double()),
        (3, torch.randn(4, 4)),
        (4, None),
        (5, mean[:2]),
        (6, 1),
        (1, ...),
    ):
        assert COMPILED.plain_running_call(*good[:index], odd, *good[index + 1 :]) is None
    with torch.overrides.TorchFunctionMode():
        assert COMPILED.plain_running_call(*good) is None
    with torch.autograd.forward_ad.dual_level():
        assert COMPILED.plain_running_call(*good) is None
    seen = torch.func.vmap(lambda _: COMPILED.plain_running_call(*good) is None and torch.ones(()))(torch.zeros(2))
    assert seen.sum() == 2
    with pytest.raises(RuntimeError, match="running_mean must be defined"):
        nn.functional.batch_norm(x, None, None)
