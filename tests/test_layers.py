"""The layers are torch's: same values, buffers, state, errors, pickles; with the activation and residual fused."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from tests.oracle import ACTIVATION, close, truth

PAIRS = [
    (BatchNorm1d, nn.BatchNorm1d, (6, 5)),
    (BatchNorm1d, nn.BatchNorm1d, (6, 5, 7)),
    (BatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 6)),
    (BatchNorm3d, nn.BatchNorm3d, (4, 5, 3, 2, 4)),
]


def twins(ours, theirs, *arguments, **keywords):
    a, b = ours(*arguments, **keywords), theirs(*arguments, **keywords)
    if b.affine:
        nn.init.uniform_(b.weight)
        nn.init.normal_(b.bias)
    a.load_state_dict(b.state_dict())
    return a, b


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("affine", [True, False])
def test_training_then_evaluation_is_torchs(ours, theirs, shape, momentum, affine):
    a, b = twins(ours, theirs, 5, 1e-3, momentum, affine, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        close(a(x), b(x).detach(), torch.float64, 10)
    for name, value in b.state_dict().items():
        close(a.state_dict()[name], value.double(), torch.float64, 10)
    x = torch.randn(shape, dtype=torch.float64)
    close(a.eval()(x), b.eval()(x).detach(), torch.float64, 10)


@pytest.mark.parametrize("activation", list(ACTIVATION))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_activation_and_residual(activation, training, with_residual):
    layer = BatchNormAct2d(3, activation or None, negative_slope=0.2).train(training)
    norm = layer.norm
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    g = torch.randn_like(x)
    moments = None if training else (norm.running_mean, norm.running_var)
    want = truth(
        x, norm.weight, norm.bias, grad_output=g, residual=residual, moments=moments,
        activation=activation, negative_slope=0.2,
    )  # fmt: skip
    out = layer(x, residual)
    out.backward(g)
    close(out, want.out, torch.float32)
    close(x.grad, want.grads["input"], torch.float32, 4)
    close(norm.weight.grad, want.grads["weight"], torch.float32, 4)
    close(norm.bias.grad, want.grads["bias"], torch.float32, 4)
    if residual is not None:
        close(residual.grad, want.grads["residual"], torch.float32, 4)


def test_gamma_sigma_beta_mu_restores_the_input():
    x = torch.randn(64, 4, dtype=torch.float64) * 5 - 2
    layer = BatchNorm1d(4, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_((x.var(0, correction=0) + layer.eps).sqrt())
        layer.bias.copy_(x.mean(0))
    close(layer(x), x, torch.float64, 10)


def test_both_ways_of_state_dict_pickle_and_copy():
    ours, theirs = BatchNorm2d(3, ghost_batch_size=2), nn.BatchNorm2d(3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, 4)
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(copy.deepcopy(ours)(x), again(x))
    theirs.__class__ = BatchNorm2d  # a layer that was never constructed here has the defaults
    assert theirs.ghost_batch_size is None
    assert theirs(x).shape == x.shape
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True))


def test_subclasses_torchs_and_says_so():
    for ours, theirs, _ in PAIRS:
        assert issubclass(ours, theirs)
    assert "ghost_batch_size=4" in repr(BatchNorm1d(3, ghost_batch_size=4))
    assert "(act): ReLU()" in repr(BatchNormAct1d(3))
    assert repr(BatchNorm1d(3)) == repr(nn.BatchNorm1d(3))


def test_bias_can_be_left_out():
    layer = BatchNorm1d(3, bias=False)
    assert layer.bias is None
    assert layer.weight is not None
    x = torch.randn(4, 3)
    close(layer(x), truth(x).out, torch.float32)


def test_buffers_off_later_still_serve_evaluation():
    for layer in twins(BatchNorm1d, nn.BatchNorm1d, 3):
        layer.track_running_stats = False
        layer(torch.randn(8, 3))
        assert layer.num_batches_tracked == 0
        x = torch.randn(2, 3)
        close(layer.eval()(x), layer.weight * x / (1 + layer.eps) ** 0.5 + layer.bias, torch.float32)


def test_empty_batch_counts_and_moves_nothing():
    layer = BatchNorm2d(3)
    layer(torch.randn(2, 3, 4, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    out = layer(x)
    out.backward(torch.randn_like(out))
    assert out.shape == x.grad.shape == x.shape
    assert torch.equal(layer.running_mean, before["running_mean"])
    assert torch.equal(layer.running_var, before["running_var"])
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1
    assert layer.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "half"])
@pytest.mark.parametrize("training", [True, False])
def test_half_input_in_every_mode(dtype, parameters, training):
    layer = BatchNorm2d(3).train(training)
    if parameters == "half":
        layer.to(dtype)
    x = (torch.randn(4, 3, 5, 5) + 1).to(dtype).requires_grad_()
    g = torch.randn(x.shape).to(dtype)
    moments = None if training else (layer.running_mean, layer.running_var)
    want = truth(x, layer.weight, layer.bias, grad_output=g, moments=moments)
    out = layer(x)
    out.backward(g)
    assert out.dtype == x.grad.dtype == dtype
    close(out, want.out, dtype)
    close(x.grad, want.grads["input"], dtype, 4)
    assert layer.weight.grad.dtype == layer.weight.dtype


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_is_torchs(cache):
    ours, theirs = twins(BatchNorm2d, nn.BatchNorm2d, 3)
    conv, x = nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        a, b = ours(conv(x)), theirs(conv(x))
    assert a.dtype == b.dtype
    close(a, b.double().detach(), torch.bfloat16, 2)


def test_a_later_forward_does_not_spoil_an_earlier_backward():
    """torch's layer in evaluation keeps its buffers for the backward: moving them in between raises there."""
    layer = BatchNorm1d(3).eval()
    x, g = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    want = truth(x, layer.weight, layer.bias, grad_output=g, moments=(layer.running_mean, layer.running_var))
    out = layer(x)
    layer.train()(torch.randn(5, 3) * 9)
    layer.running_var.zero_()
    out.backward(g)
    close(x.grad, want.grads["input"], torch.float32, 4)


def test_activation_saves_no_tensor_more_than_bn_alone():
    """ "No tensor more": the same bytes are held for the backward, whatever the activation."""

    def held(activation):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes), lambda _: None):
            BatchNormAct2d(3, activation)(torch.randn(4, 3, 8, 8, requires_grad=True))
        return sum(sizes)

    plain = held(None)
    assert plain < 2 * 4 * 3 * 64 * 4
    assert all(held(name) == plain for name in ACTIVATION if name)


@given(st.sampled_from(PAIRS), st.integers(0, 10), st.sampled_from(list(ACTIVATION)))
def test_any_channels_last_batch(pair, samples, activation):
    ours, _, shape = pair
    x = torch.randn(samples, *shape[1:]).movedim(1, -1).contiguous().movedim(-1, 1)
    if samples * x[:1].numel() == shape[1]:
        return
    layer = {BatchNorm1d: BatchNormAct1d, BatchNorm2d: BatchNormAct2d, BatchNorm3d: BatchNormAct3d}[ours](
        5, activation or None
    )
    out = layer(x)
    assert out.stride() == x.stride()
    close(out, truth(x, activation=activation).out, torch.float32)


def test_names_are_exported():
    for name in batchnorm.__all__:
        assert name in dir(batchnorm)
    assert callable(batchnorm.functional.batch_norm)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = batchnorm.no_such_thing


def test_functional_is_a_superset_of_torchs():
    x, mean, var = torch.randn(6, 3), torch.randn(3), torch.rand(3)
    weight, bias = torch.randn(3), torch.randn(3)
    for training in (True, False):
        ours, theirs = (mean.clone(), var.clone()), (mean.clone(), var.clone())
        a = batchnorm.functional.batch_norm(x, *ours, weight, bias, training, 0.3, 1e-4)
        b = F.batch_norm(x, *theirs, weight, bias, training, 0.3, 1e-4)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours, theirs)
