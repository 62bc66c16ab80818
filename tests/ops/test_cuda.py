"""What only a GPU can show: real sizes, streams, graphs, compiled code, NCCL. Skipped where there is none."""

import copy
import os

import pytest
import torch
import torch.distributed as dist

import batchnorm
from batchnorm.ops import ACTIVATIONS
from tests.ops.test_operators import layout
from tests.oracle import TOLERANCE, truth

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's own remarks: on TF32 in compiled code, on an empty graph that cudagraph trees record, on a debug mode
    *(
        pytest.mark.filterwarnings(f"ignore:.*{said}")
        for said in ("TensorFloat32 tensor cores", "The CUDA Graph is empty", "Synchronization debug mode")
    ),
]
OPS = torch.ops.batchnorm
# one of each stage of a ResNet, and sizes that no tile divides: channels, positions and samples
SHAPES = [
    (16, 64, 56, 56),
    (32, 512, 7, 7),
    (9, 100, 14, 14),
    (3, 3, 127, 65),
    (5, 2048, 3, 3),
    (4096, 1024),
    (60, 100),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(*shape, dtype=torch.float32, arrangement="contiguous"):
    return layout(torch.randn(shape, device="cuda").to(dtype), arrangement)


def far(found, want):
    """‖found − want‖ / ‖want‖; a kink's few elements that round apart count little."""
    return ((found.double() - want).norm() / want.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_of_networks(shape, dtype, arrangement, masked):
    x, r, g = (random(*shape, dtype=dtype, arrangement=arrangement) for _ in range(3))
    x = x * 3 + 5
    activation = "silu" if masked else "relu"
    mask = torch.rand(shape[0], x[0, 0].numel(), device="cuda") < 0.7 if masked else None
    w, b = torch.rand(shape[1], device="cuda"), torch.randn(shape[1], device="cuda")
    w, b = (t.double() if dtype == torch.float64 else t for t in (w, b))
    slice_size = (7 if x.dim() > 2 else 30) if masked else 0  # enough real values a slice, or float16 overflows
    want = truth(x, w, b, residual=r, mask=mask, activation=activation, slice_size=slice_size, grad_output=g)
    form = (1e-5, activation, 0.01, slice_size)
    out, mean, var, count = OPS.forward(x, w, b, r, mask, *form)
    grads = OPS.backward(g, x, mean, var, count, w, b, r, mask, *form, [True] * 4)
    moments = 1e-12 if dtype == torch.float64 else 1e-6
    assert far(mean, want.mean) < moments
    assert far(var, want.var) < moments
    limit = 4 * TOLERANCE[dtype]
    assert far(out, want.out) < limit
    kinks = 3e-3 if activation == "relu" and dtype != torch.float64 else 0.0
    for name, grad in zip(("input", "weight", "bias", "residual"), grads, strict=True):
        assert far(grad, want.grads[name]) < limit + kinks, name


@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_the_same_bits_while_another_stream_is_busy(activation, arrangement):
    x, r, g = (random(16, 96, 40, 40, dtype=torch.bfloat16, arrangement=arrangement) for _ in range(3))
    w, b = torch.rand(96, device="cuda"), torch.randn(96, device="cuda")
    form, other, noise = (1e-5, activation, 0.1, 0), torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")

    def once():
        out, mean, var, count = OPS.forward(x, w, b, r, None, *form)
        return (out, mean, var, *OPS.backward(g, x, mean, var, count, w, b, r, None, *form, [True] * 4))

    first = once()
    for _ in range(5):
        with torch.cuda.stream(other):
            noise @ noise
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_more_elements_than_32_bits_number():
    x = torch.empty(70_000, 32, 32, 32, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    for part in x.split(7_000):
        part.normal_(3.0)
    for y in (x, x.view(70_000, 32, 32, 32).as_strided(x.shape, (32 * 1024, 1, 1024, 32))):
        out, mean, var, count = OPS.forward(y, None, None, None, None, 1e-5, "", 0.0, 0)
        assert count.item() == y.numel() / 32
        assert (mean - 3).abs().max() < 1e-3
        tail = (y[-10:].double() - mean.view(1, -1, 1, 1)) / (var + 1e-5).sqrt().view(1, -1, 1, 1)
        assert far(out[-10:], tail) < 8e-3


def block(shape, **keywords):
    torch.manual_seed(1)
    kind = batchnorm.BatchNormAct1d if len(shape) == 2 else batchnorm.BatchNormAct2d
    return kind(shape[1], "relu", device="cuda", **keywords)


def step(layer, x, r, g):
    x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
    out = layer(x, r)
    return [out.detach(), *torch.autograd.grad(out, [x, r, *layer.parameters()], g)]


@pytest.mark.parametrize("shape", [(8, 32, 20, 20), (60, 100)])
def test_a_cuda_graph_replays_the_step_and_moves_the_buffers(shape):
    layer, twin = block(shape), block(shape)
    x, r, g = (random(*shape) for _ in range(3))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(layer, x, r, g)
    torch.cuda.current_stream().wait_stream(stream)
    twin.load_state_dict(layer.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layer, x, r, g)
    for _ in range(3):
        x.normal_(2.0)
        g.normal_()
        graph.replay()
        for a, b in zip(found, step(twin, x, r, g), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_torch_compile_runs_the_kernels(mode):
    torch._dynamo.reset()
    shape = (8, 32, 20, 20)
    layer, x, r, g = block(shape), *(random(*shape) for _ in range(3))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, mode=None if mode == "default" else mode)
    for _ in range(3):
        found = [t.clone() for t in step(compiled, x, r, g)]
        for a, b in zip(found, step(twin, x, r, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("keywords", [{}, {"nonfinite": "skip"}, {"ghost_batch_size": 4}, {"momentum": None}])
def test_a_training_step_waits_for_nothing(keywords):
    """Nothing is read back: the host may run ahead of the device."""
    shape = (8, 32, 20, 20)
    layer, x, r, g = block(shape, **keywords), *(random(*shape) for _ in range(3))
    step(layer, x, r, g)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(layer, x, r, g)
        layer.eval()
        step(layer, x, r, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast_gives_bfloat16_with_float32_parameters():
    conv = torch.nn.Conv2d(8, 16, 3, device="cuda")
    layer, x = batchnorm.BatchNormAct2d(16, "relu", device="cuda"), random(4, 8, 20, 20)
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(conv(x))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.norm.weight.grad.dtype == torch.float32
    assert conv.weight.grad.isfinite().all()


@pytest.fixture
def one_rank():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("nccl", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_synchronized_over_nccl(one_rank):
    shape = (8, 32, 20, 20)
    layer = block(shape, process_group=one_rank)
    twin = block(shape)
    x, r, g = (random(*shape) for _ in range(3))
    for a, b in zip(step(layer, x, r, g), step(twin, x, r, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
