"""A training call whose output takes the input's place: values, gradients, when it does and when it must not."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNormAct1d, BatchNormAct2d, convert, functional
from batchnorm.errors import UserError
from batchnorm.ops import extension, fused
from tests.oracle import close, truth

OPS = torch.ops.batchnorm
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
compiled = pytest.mark.skipif(not extension.LOADED, reason="only the compiled kernels write over their input")


def random(*size, dtype=torch.float64, last=False, scale=1.0, shift=0.0):
    made = (torch.randn(size) * scale + shift).to(dtype)
    return made.movedim(1, -1).contiguous().movedim(-1, 1) if last else made


def vectors(channels, dtype):
    """γ of both signs, none near 0, and β not far beyond."""
    weight = (torch.rand(channels) + 0.5) * torch.where(torch.rand(channels) < 0.5, -1, 1)
    return weight.to(dtype), torch.randn(channels).clamp(-1, 1).to(dtype)


def buffers(channels, dtype):
    return torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype), torch.tensor(0)


@pytest.mark.parametrize("slice_size", [0, 3])
@pytest.mark.parametrize("activation", ["", "leaky_relu"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(9, 5), (7, 19, 5, 7), (4, 40, 67), (6, 3, 2000)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [OPS.backward_inplace, fused.backward_inplace])
def test_operators_are_the_truth(backward, dtype, shape, last, activation, slice_size):
    input = random(*shape, dtype=dtype, last=last, scale=3, shift=2)
    grad_output = random(*shape, dtype=dtype, last=last)
    weight, bias = vectors(shape[1], dtype)
    form = (1e-5, activation, 0.25, slice_size)
    want = truth(
        input, weight, bias, grad_output=grad_output, activation=activation, negative_slope=0.25, slice_size=slice_size
    )
    held, storage = buffers(shape[1], dtype), input.data_ptr()
    expected = OPS.forward_update_running_(
        input, weight, bias, None, None, *buffers(shape[1], dtype), 0.1, False, *form
    )
    mean, var, count = OPS.forward_inplace_(input, weight, bias, *held, 0.1, False, *form)
    assert input.data_ptr() == storage
    assert torch.equal(input, expected[0])  # the very bits of the call that keeps its input
    for found, other in zip((mean, var, count), expected[1:], strict=True):
        assert torch.equal(found, other)
    assert held[2] == 1
    grads = backward(grad_output, input, mean, var, count, weight, bias, *form, [True, True, True])
    assert grads[0].stride() == input.stride()
    terms = grad_output.double().abs().sum().item() / shape[1]
    for name, grad in zip(("input", "weight", "bias"), grads, strict=True):
        # x̂ is told from an output that was rounded, after a division by γ ≥ 0.5 and, below 0, by 0.25
        close(grad, want.grads[name], dtype, 30, terms if name != "input" else 1.0)


@compiled
@pytest.mark.parametrize("threads", [1, 3])
def test_a_tensor_beyond_the_cache_is_written_over_too(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        input, grad_output = random(16, 64, 96, 96, dtype=torch.float32), random(16, 64, 96, 96, dtype=torch.float32)
        weight, bias = vectors(64, torch.float32)
        form = (1e-5, "leaky_relu", 0.1, 0)
        out, *moments = OPS.forward(input, weight, bias, None, None, *form)
        plain = OPS.backward(grad_output, input, *moments, weight, bias, None, None, *form, [True, True, True, False])
        moments = OPS.forward_inplace_(input, weight, bias, None, None, None, 0.1, False, *form)
        assert torch.equal(input, out)
        grads = OPS.backward_inplace(grad_output, input, *moments, weight, bias, *form, [True, True, True])
        for found, expected in zip(grads, plain, strict=False):
            close(found, expected.double(), torch.float32, 10)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_values_that_float32_coefficients_cannot_hold(scale):
    input, grad_output = random(8, 3, 50, scale=1).float() * scale, random(8, 3, 50, dtype=torch.float32)
    weight, bias = vectors(3, torch.float32)
    want = truth(input, weight, bias, grad_output=grad_output, activation="leaky_relu", negative_slope=0.1, eps=1e-300)
    form = (1e-300, "leaky_relu", 0.1, 0)
    moments = OPS.forward_inplace_(input, weight, bias, None, None, None, 0.1, False, *form)
    grads = OPS.backward_inplace(grad_output, input, *moments, weight, bias, *form, [True, True, True])
    close(grads[0] * scale, want.grads["input"] * scale, torch.float32, 30)
    close(grads[1], want.grads["weight"], torch.float32, 30)


def test_the_sign_of_the_smallest_output_chooses_the_slope():
    """z − β of a z far below β's last place is −β: the slope must come from z, not from z − β + β."""
    weight, bias = torch.tensor([1.0]), torch.tensor([3.0])
    out = torch.tensor([[1e-12], [-1e-12], [6.0], [0.3]])
    mean, var, count = torch.zeros(1, 1).double(), torch.ones(1, 1).double(), torch.tensor([4.0]).double()
    found = OPS.backward_inplace(
        torch.ones(4, 1), out, mean, var, count, weight, bias, 0.0, "leaky_relu", 0.125, 0, [False, False, True]
    )
    assert found[2].item() == 3.125


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.1), ("leaky_relu", 0.0), ("leaky_relu", -0.1)])
@pytest.mark.parametrize("backward", [OPS.backward_inplace, fused.backward_inplace])
def test_a_backward_refuses_what_cannot_be_undone(backward, activation, slope):
    x = random(4, 3, 5, dtype=torch.float32)
    with pytest.raises((RuntimeError, ValueError), match="undone from its output"):
        backward(x, x, *OPS.stats(x, None, 0), None, None, 1e-5, activation, slope, 0, [True, False, False])


@pytest.mark.parametrize("op", ["forward_inplace_", "backward_inplace"])
def test_opcheck(op):
    weight, bias = vectors(3, torch.float32)
    form = (1e-5, "leaky_relu", 0.1, 2)
    x = random(5, 3, 4, dtype=torch.float32)
    if op == "forward_inplace_":
        arguments = (x, weight, bias, *buffers(3, torch.float32), 0.1, False, *form)
    else:
        moments = OPS.stats(x, None, 2)
        arguments = (torch.randn(5, 3, 4), x, *moments, weight, bias, *form, [True, True, True])
    torch.library.opcheck(getattr(OPS, op).default, arguments)


@compiled
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": "relu"}, "only leaky_relu"),
        ({"negative_slope": 0.0}, "only leaky_relu"),
        ({"negative_slope": -0.1}, "only leaky_relu"),
        ({"x": torch.zeros(4, 3, 8)[..., ::2]}, "contiguous or channels_last"),
        ({"x": torch.zeros(8)[::2]}, "at least 2 dimensions"),
    ],
)
def test_operators_refuse_before_they_write(arguments, words):
    x = arguments.get("x", torch.randn(4, 3, 4))
    saved = x.clone()
    form = (1e-5, arguments.get("activation", "leaky_relu"), arguments.get("negative_slope", 0.1), 0)
    with pytest.raises(RuntimeError, match=words):
        OPS.forward_inplace_(x, None, None, None, None, None, 0.1, False, *form)
    assert torch.equal(x, saved)


def layer(dtype=torch.float64, **keywords):
    made = BatchNormAct2d(
        3, dtype=dtype, **{"activation": "leaky_relu", "negative_slope": 0.2, "inplace": True} | keywords
    )
    if made.norm.weight is not None:
        with torch.no_grad():
            for parameter, value in zip((made.norm.weight, made.norm.bias), vectors(3, dtype), strict=True):
                parameter.copy_(value)
    return made


def step(model, x, grad):
    leaf = x.clone().requires_grad_()
    out = model(leaf * 1)
    gradients = torch.autograd.grad(out, [leaf, *model.parameters()], grad)
    return out.detach(), gradients


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ghost_batch_size", [None, 2])
def test_a_layer_gives_what_it_gives_without(activation, affine, ghost_batch_size):
    a = layer(activation=activation, affine=affine, ghost_batch_size=ghost_batch_size)
    b = layer(activation=activation, affine=affine, ghost_batch_size=ghost_batch_size, inplace=False)
    b.load_state_dict(a.state_dict())
    x, grad = random(4, 3, 5, 5), random(4, 3, 5, 5)
    (out, grads), (other, others) = step(a, x, grad), step(b, x, grad)
    assert torch.equal(out, other)
    for found, expected in zip(grads, others, strict=True):
        close(found, expected, torch.float64, 100)
    for name, buffer in a.named_buffers():
        assert torch.equal(buffer, b.get_buffer(name))


@compiled
def test_the_output_takes_the_input_s_place_and_is_what_is_kept():
    x = random(4, 3, 5, 5).requires_grad_() * 1
    out = layer()(x)
    assert out.data_ptr() == x.data_ptr()
    saved = out.grad_fn.saved_tensors
    assert {t.data_ptr() for t in saved if t.numel() >= x.numel()} == {x.data_ptr()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [0.0, 1e-30, float("nan"), -1e-4])
def test_an_output_that_does_not_tell_its_input_is_not_written_over_it(dtype, weight):
    model = layer(dtype, bias=True)
    with torch.no_grad():
        model.norm.weight[1], model.norm.bias[1] = weight, 300.0
    x = random(4, 3, 5, 5).to(dtype).requires_grad_() * 1
    saved = x.detach().clone()
    out = model(x)
    assert torch.equal(x, saved)
    assert out.data_ptr() != x.data_ptr()


HELD = torch.randn(4, 3, 5, 5)


def held():
    return HELD.clone().requires_grad_() * 1


@pytest.mark.parametrize(
    ("keywords", "make"),
    [
        ({}, lambda: torch.randn(4, 3, 5, 5, requires_grad=True)),  # torch would refuse it
        ({}, lambda: HELD.clone()),  # data, of which the next epoch may want more
        ({}, lambda: (torch.randn(8, 3, 5, 5).requires_grad_() * 1).chunk(2)[0]),  # someone else's memory
        ({}, lambda: torch.randn(4, 3, 5, 1).requires_grad_().expand(4, 3, 5, 5)),
        ({"activation": "relu"}, held),
        ({"negative_slope": 0.0}, held),
        ({"nonfinite": "skip"}, held),
        ({"accumulation_steps": 2}, held),
        ({"track_running_stats": False}, held),
    ],
)
def test_where_it_cannot_be_the_input_stays(keywords, make):
    model, x = layer(torch.float32, **keywords), make()
    saved = x.detach().clone()
    model(x)
    assert torch.equal(x, saved)


def test_with_a_residual_a_mask_or_in_evaluation_the_input_stays():
    model, x = layer(torch.float32), held()
    model(x, residual=torch.randn_like(x))
    model(x, mask=torch.rand(4, 5, 5) < 0.5)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert torch.equal(x, HELD)


def test_whoever_watches_finds_the_input():
    model, x, seen = layer(torch.float32), held(), []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(args[0].detach().clone()))
    model(x)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    model(x)
    handle.remove()
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        model(x)
    assert torch.equal(x, HELD)
    assert torch.equal(seen[0], HELD)


@compiled
def test_gradients_of_gradients_are_refused_in_words():
    x = random(4, 3, 5, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="inplace=False"):
        torch.autograd.grad(layer()(x * 1).sum(), x, create_graph=True)


@compiled
def test_torch_sees_the_write():
    """What another backward saved of the input is refused by torch, and so is an output that was changed since."""
    model, x = layer(), random(4, 3, 5, 5).requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.sigmoid(x)).square().sum().backward()
    out = model(x * 1)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def network(inplace):
    torch.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)),
        *(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)),
    ).double()
    return convert(model, inplace=inplace)


def test_a_converted_network_trains_the_same():
    x, models = random(8, 3, 9, 9), [network(False), network(True)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        close(b.double(), a.double(), torch.float64, 1e3)


class PreActivation(nn.Module):
    """Its shortcut reads what the normalization reads; written over, it would add the wrong thing in silence."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.conv(self.norm(x))


def test_convert_allows_it_only_where_nobody_else_reads_the_input():
    shared, watched = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
    watched.register_forward_hook(lambda module, args, out: None)
    model = nn.Sequential(
        PreActivation(),
        nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Conv2d(3, 3, 1), shared),
        nn.Sequential(watched, nn.BatchNorm2d(3)),
        nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(75, 4), nn.BatchNorm1d(4)),
    )
    convert(model, inplace=True)
    assert overwritten(model) == 4  # each call in a Sequential, the shared layer's too
    convert(model, inplace=False)
    assert overwritten(model) == 0
    assert torch.isfinite(model(torch.randn(4, 3, 5, 5))).all()


def overwritten(model):
    """How many normalizations take their input's place in a training call."""
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Log():
        model(torch.randn(4, 3, 5, 5))
    return seen.count(OPS.forward_inplace_.default)


@compiled
def test_convert_sets_it_only_through_a_sequential_s_call():
    with pytest.raises(UserError, match="fuse_sequential=True"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), inplace=True, fuse_sequential=False)


def test_a_recomputed_segment_counts_once_and_is_the_same():
    x, grads = random(8, 3, 9, 9), []
    for how in (None, True, False):
        model = network(inplace=True)
        leaf = x.clone().requires_grad_()
        out = model(leaf) if how is None else checkpoint(model[1:], model[0](leaf), use_reentrant=how)
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        assert model[1].num_batches_tracked == 1
    for want, *found in zip(*grads, strict=True):
        for grad in found:
            close(grad, want, torch.float64, 1e3)


def test_compiled_it_is_left_to_the_compiler():
    torch._dynamo.reset()
    model = layer(torch.float32)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), model)
    out = torch.compile(network, fullgraph=True, backend="aot_eager")(HELD)
    close(out, network(HELD).double(), torch.float32, 1)


def test_the_function_takes_it_too():
    x, mean, var = held(), torch.zeros(3), torch.ones(3)
    out = functional.batch_norm(x, mean, var, training=True, activation="leaky_relu", inplace=True)
    assert (out.data_ptr() == x.data_ptr()) == extension.LOADED
    want = F.leaky_relu(F.batch_norm(HELD, None, None, training=True))
    close(out, want.double(), torch.float32, 2)


def test_one_value_a_channel_is_refused_and_nothing_written():
    x = torch.randn(1, 3)
    saved = x.clone()
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNormAct1d(3, inplace=True)(x)
    assert torch.equal(x, saved)
