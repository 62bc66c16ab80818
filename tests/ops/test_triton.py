"""The Triton kernels against the oracle: natively where there is a GPU, else on CPU tensors by Triton's interpreter.

The interpreter runs a program in tens of milliseconds, so shapes are tiny and the partition is drawn too: tiles of 16
elements make a tensor of 100 walk the chunks, the partial results and their merge, as one of 10⁸ does by default.
What only the compiler can refuse is in test_triton_compiles.py.
"""

import copy
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.moments import Renorm
from batchnorm.norm_act import BatchNormAct1d, BatchNormAct2d
from batchnorm.ops import ACTIVATIONS, fused, reference, register
from batchnorm.ops.layout import dense
from tests.ops.test_operators import compare_gradients, expected, form, layout
from tests.oracle import close, truth

pytest.importorskip("triton", reason="the kernels are written in Triton, which has wheels for Linux only")
from batchnorm.ops.triton import launch

# The interpreter computes in NumPy, which warns where a GPU computes NaN, Inf or a subnormal in silence.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("invalid value", "overflow", "divide by zero", "underflow")
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = {name: register.kernel(name) for name in register.REFERENCE}
PARTITIONS = {"default": {}, "chunks": {"MAX_TILE": 16, "MAX_FUSED": 1}, "tiles": {"MAX_TILE": 32, "MAX_FUSED": 1}}
EXTREMES = [(1e6, 1.0), (0.0, 1e18), (1e30, 1e30), (0.0, 1e-30), (0.0, 1e-42), (3.0, 0.0)]
few = settings(max_examples=8)


@contextmanager
def partitioned(name):
    """Partition tensors as `name` says."""
    with pytest.MonkeyPatch.context() as patch:
        for constant, value in PARTITIONS[name].items():
            patch.setattr(launch, constant, value)
        yield


def device(tensors):
    """To the device, each in its own memory order."""
    return {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}


@st.composite
def problems(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)):
    spatial = draw(st.sampled_from([(), (1,), (5,), (3, 4), (2, 1, 2), (1, 17)]))
    samples, channels = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if not spatial or draw(st.booleans()):  # channels innermost: more of them cost no more programs
        channels, arrangement = draw(st.integers(1, 11)), "channels_last"
    else:
        arrangement = draw(st.sampled_from(["contiguous", "contiguous", "strided"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, shape = draw(st.sampled_from(dtypes)), (samples, channels, *spatial)

    def random(*size, shift=0.0):
        return torch.randn(size, generator=generator) + shift

    vector_dtype = draw(st.sampled_from([dtype, torch.float32])) if dtype.itemsize == 2 else dtype
    affine = draw(st.sampled_from(["none", "weight", "both", "both"]))
    other = st.sampled_from(["contiguous", "channels_last"])
    mask = torch.rand(samples, random(*shape)[0, 0].numel(), generator=generator) < 0.7
    return {
        "input": layout(random(*shape, shift=2.0).to(dtype), arrangement),
        "weight": None if affine == "none" else random(channels, shift=0.5).to(vector_dtype),
        "bias": random(channels).to(vector_dtype) if affine == "both" else None,
        "residual": layout(random(*shape).to(dtype), draw(other)) if draw(st.booleans()) else None,
        "mask": mask if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from(["", *ACTIVATIONS])),
        "slice_size": draw(st.sampled_from([0, 0, 0, 2, 3])),
        "grad_output": layout(random(*shape).to(dtype), draw(other)),
    }


def vectors_close(found, want, dtype):
    """Moments are float64 made of float32 tiles: as exact as float32 sums, or as float64's where the input is."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    close(found.cpu(), want, exact, 1e3 if exact == torch.float64 else 1)


def gradients_close(p, want, *found):
    compare_gradients(p, want, *(t.cpu() for t in found))


@given(problems(), st.sampled_from([*PARTITIONS]))
@settings(max_examples=16)
def test_forward_and_backward_are_the_truth(p, partition):
    want, dtype, q = expected(p), p["input"].dtype, device(p)
    given_ = (q["weight"], q["bias"], q["residual"], q["mask"])
    with partitioned(partition):
        out, mean, var, count = OPS["forward"](q["input"], *given_, *form(p))
        found = OPS["backward"](q["grad_output"], q["input"], mean, var, count, *given_, *form(p), [True] * 4)
    assert out.dtype == dtype
    assert out.stride() == dense(p["input"]).stride()
    close(out.cpu(), want.out, dtype)
    vectors_close(mean, want.mean, dtype)
    vectors_close(var, want.var, dtype)
    assert torch.equal(count.cpu(), want.count)
    gradients_close(p, want, *found)


@given(problems())
@few
def test_the_four_primitives_compose_to_the_truth(p):
    want, dtype, q = expected(p), p["input"].dtype, device(p)
    given_ = (q["weight"], q["bias"], q["residual"])
    mean, var, count = OPS["stats"](q["input"], q["mask"], p["slice_size"])
    vectors_close(var, want.var, dtype)
    close(OPS["apply"](q["input"], mean, var, *given_, *form(p)).cpu(), want.out, dtype)
    ends = (q["grad_output"], q["input"], mean, var, *given_, q["mask"])
    sums = OPS["backward_reduce"](*ends, *form(p))
    dx, dres = OPS["backward_elemt"](*ends, *sums, count, *form(p), p["residual"] is not None)
    gradients_close(p, want, dx, *fused.grad_affine_vectors(*sums, var, 1e-5), dres)


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_every_activation_with_its_derivative(activation):
    """On a dense grid of z that crosses each kink and, for tanh, the seam of its two formulas."""
    x = torch.linspace(-9, 9, 160).view(1, 4, 40).expand(3, 4, 40).contiguous()
    g, mean, var = torch.randn_like(x), torch.zeros(4), torch.ones(4)
    want = truth(x, grad_output=g, moments=(mean, var), eps=0.0, activation=activation, negative_slope=0.2)
    x, g, mean, var = (t.to(DEVICE) for t in (x, g, mean, var))
    tail = (None, None, None)
    close(OPS["apply"](x, mean, var, *tail, 0.0, activation, 0.2, 0).cpu(), want.out, torch.float32)
    ends = torch.tensor([[-3e38, -1e20, 3e38, -torch.inf], [torch.inf, torch.nan, -200.0, 200.0]], device=DEVICE)
    there = (mean, var, *tail, 0.0, activation, 0.2, 0)
    found, exact = OPS["apply"](ends, *there), reference.apply(ends.double(), *there).float()
    torch.testing.assert_close(found, exact, equal_nan=True)
    wanted = [True, False, False, False]
    dx, *others = OPS["backward"](g, x, mean, var, None, *tail, None, 0.0, activation, 0.2, 0, wanted)
    close(dx.cpu(), want.grads["input"], torch.float32, 4)
    assert all(t.numel() == 0 for t in others)


@pytest.mark.parametrize("partition", ["default", "chunks"])
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mean", "sd"), [(1e6, 1.0), (0.0, 1e18), (1e30, 1e30), (0.0, 1e-30), (0.0, 1e-42), (3.0, 0.0)]
)
def test_extreme_inputs_in_float32(partition, arrangement, mean, sd):
    x = layout((torch.randn(4, 2, 13, dtype=torch.float64) * sd + mean).float(), arrangement)
    g = torch.randn_like(x)
    want, x, g = truth(x, grad_output=g), x.to(DEVICE), g.to(DEVICE)
    tail = (None, None, None, None, 1e-5, "", 0.01, 0)
    with partitioned(partition):
        out, m, v, count = OPS["forward"](x, *tail)
        dx, *_ = OPS["backward"](g, x, m, v, count, *tail, [True] + [False] * 3)
    close(out.cpu(), want.out, torch.float32, 2 if 0 < sd < 1e-38 else 1)  # a subnormal result has fewer bits
    close(dx.cpu(), want.grads["input"], torch.float32, 4)


@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
def test_chunks_far_apart_cancel_nothing(arrangement):
    """Samples whose means differ by 1e6 standard deviations: no one shift serves them, so the tiles' results merge."""
    x = torch.randn(6, 2, 8) + torch.tensor([0.0, 1e6, 0.0, -1e6, 5.0, 1e3]).view(6, 1, 1)
    want = truth(x, slice_size=2)
    with partitioned("chunks"):
        mean, var, _ = OPS["stats"](layout(x, arrangement).to(DEVICE), None, 2)
    assert ((mean.cpu() - want.mean).abs() <= 1e-7 * want.var.sqrt()).all()
    assert ((var.cpu() / want.var - 1).abs() <= 1e-6).all()


@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
def test_a_short_last_slice_leaves_chunks_empty(arrangement):
    """Five samples in slices of four: the chunks are made for four, and some of the fifth sample's have no value."""
    x, g = torch.randn(5, 3, 40) + 2, torch.randn(5, 3, 40)
    want = truth(x, grad_output=g, slice_size=4)
    x, g = layout(x, arrangement).to(DEVICE), layout(g, arrangement).to(DEVICE)
    tail = (None, None, None, None, 1e-5, "", 0.01, 4)
    with partitioned("chunks"):
        plan = launch.make_plan(x, 4, launch.STATS)
        assert plan.rows - plan.slice_rows <= (plan.chunks - 1) * plan.tiles * plan.tile[0]  # its last chunk is empty
        out, mean, var, count = OPS["forward"](x, *tail)
        dx, *_ = OPS["backward"](g, x, mean, var, count, *tail, [True] + [False] * 3)
    assert count.tolist() == [160, 40]
    close(out.cpu(), want.out, torch.float32)
    vectors_close(var, want.var, torch.float32)
    close(dx.cpu(), want.grads["input"], torch.float32, 4)


@given(p=problems(dtypes=(torch.float32,)))
@few
def test_padding_may_hold_anything(p):
    """NaN under the mask changes no real position, forward or backward, and receives no gradient."""
    shape = p["input"].shape
    p["mask"], p["residual"] = torch.rand(shape[0], p["input"][0, 0].numel()) < 0.6, None
    padding = ~p["mask"].view(shape[0], 1, *shape[2:]).expand(shape)
    p["grad_output"] = p["grad_output"].masked_fill(padding, 0)
    want, dirty = expected(p), p["input"].masked_fill(padding, float("nan"))
    q = device(p | {"input": dirty})
    given_ = (q["weight"], q["bias"], None, q["mask"])
    out, mean, var, count = OPS["forward"](q["input"], *given_, *form(p))
    found = OPS["backward"](
        q["grad_output"], q["input"], mean, var, count, *given_, *form(p), [True, True, True, False]
    )
    close(out.cpu().masked_fill(padding, 0), want.out.masked_fill(padding, 0), torch.float32)
    want.grads["input"] = want.grads["input"].masked_fill(padding, 0)
    assert (found[0].cpu()[padding] == 0).all()
    gradients_close(p, want, *found)


def test_an_infinite_value_reaches_the_moments_as_in_the_reference():
    x = torch.randn(3, 2, 8)
    x[1, 0, 3] = float("inf")
    x[2, 1, 2] = float("nan")
    for found, want in zip(OPS["stats"](x.to(DEVICE), None, 0), reference.stats(x, None, 0), strict=True):
        torch.testing.assert_close(found.cpu(), want, equal_nan=True, rtol=1e-6, atol=0)


@given(problems(), st.lists(st.booleans(), min_size=4, max_size=4), st.booleans())
@settings(max_examples=5)
def test_only_the_gradients_asked_for(p, wanted, fixed):
    q = device(p)
    given_ = (q["weight"], q["bias"], q["residual"], q["mask"])
    mean, var, count = reference.stats(q["input"], q["mask"], p["slice_size"])
    ends = (q["grad_output"], q["input"], mean, var, None if fixed else count, *given_, *form(p))
    full, some = OPS["backward"](*ends, [True] * 4), OPS["backward"](*ends, wanted)
    for complete, part, want in zip(full, some, wanted, strict=True):
        assert torch.equal(part, complete) if want else part.numel() == 0


@pytest.mark.parametrize("partition", PARTITIONS)
def test_the_same_bits_every_run(partition):
    x = layout(torch.randn(3, 3, 5, 3), "channels_last").to(DEVICE)
    g = torch.randn_like(x)
    runs = []
    for _ in range(2):
        with partitioned(partition):
            out, mean, var, count = OPS["forward"](x, None, None, None, None, 1e-5, "silu", 0.0, 2)
            ends = (g, x, mean, var, count, None, None, None, None, 1e-5, "silu", 0.0, 2)
            runs.append((out, mean, var, OPS["backward"](*ends, [True] + [False] * 3)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@given(
    st.integers(1, 3), st.integers(1, 20), st.sampled_from([0.1, 0.3, 1.0, None]), st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.sampled_from(["both", "mean", "untracked"]),
    st.sampled_from([None, float("nan"), float("inf"), 1e39]), st.sampled_from([0.0, 1.0, 7.0]),
    st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16]),
)  # fmt: skip
@settings(max_examples=20)
def test_the_buffers_move_as_in_the_reference(rows, channels, momentum, skip, dtype, given_, odd, least, counter):
    mean, var = torch.randn(rows, channels, dtype=torch.float64), torch.rand(rows, channels, dtype=torch.float64)
    count = torch.arange(rows).double() + least
    if odd is not None:
        mean[-1, -1] = odd
    buffers = [torch.randn(channels).to(dtype), torch.rand(channels).to(dtype), torch.tensor(3, dtype=counter)]
    if given_ == "mean":
        buffers[1] = None
    if given_ == "untracked" and momentum is not None:
        buffers[2] = None
    found = [None if b is None else b.to(DEVICE, copy=True) for b in buffers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[OPS["update_running_"].__module__], "BLOCK", 8)
        OPS["update_running_"](*found, *(t.to(DEVICE) for t in (mean, var, count)), momentum, skip)
    fused.update_running_(*buffers, mean, var, count, momentum, skip)
    for a, b in zip(found, buffers, strict=True):
        if b is not None:
            rtol = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
            torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=rtol, equal_nan=True)


def test_one_launch_where_a_channel_fits_a_tile(monkeypatch):
    launches = []
    run = launch.run
    for name in ("forward", "backward", "backward_reduce", "backward_elemt", "stats", "apply"):
        module = __import__(f"batchnorm.ops.triton.{name}", fromlist=["run"])
        monkeypatch.setattr(module, "run", lambda *a, **m: (launches.append(a[0]), run(*a, **m))[1])
    x, w, b = torch.randn(6, 10, device=DEVICE), torch.rand(10, device=DEVICE), torch.rand(10, device=DEVICE)
    out, mean, var, count = OPS["forward"](x, w, b, None, None, 1e-5, "relu", 0.0, 0)
    assert len(launches) == 1
    OPS["backward"](out, x, mean, var, count, w, b, None, None, 1e-5, "relu", 0.0, 0, [True, True, True, False])
    assert len(launches) == 2


@pytest.fixture
def routed():
    """The operators themselves on Triton: as registered on a GPU; on CPU tensors, registered for the test."""
    if DEVICE == "cuda":
        yield
        return
    with torch.library._scoped_library("batchnorm", "IMPL") as library:
        with warnings.catch_warnings():  # where the C++ kernels are built, these take their place
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name, kernel in OPS.items():
                library.impl(name, kernel, "CPU")
        yield


def trained_once(layer, x, g, **more):
    """Output, gradients and moved buffers, in float64 on the CPU."""
    x = x.clone().requires_grad_()
    out = layer(x, **more)
    found = torch.autograd.grad(out, [x, *layer.parameters()], g)
    return [t.detach().cpu().double() for t in (out, *found, *layer.buffers())]


VARIANTS = {
    "renorm": (BatchNormAct2d, {"renorm": Renorm(r_max=1.5, d_max=0.5)}),
    "masked and ghost": (BatchNormAct1d, {"ghost_batch_size": 2}),
    "frozen": (BatchNormAct2d, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_on_the_kernels_unchanged(variant, request):
    kind, keywords = VARIANTS[variant]
    shape = (5, 3, 4, 2) if kind is BatchNormAct2d else (5, 3, 6)
    x, g = torch.randn(shape) * 2 + 1, torch.randn(shape)
    mask = {"mask": torch.rand(5, 6) < 0.7} if "masked" in variant else {}
    layer = kind(3, "relu", **keywords)
    for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean):
        torch.nn.init.normal_(tensor)
    layer.norm.frozen = variant == "frozen"
    want = trained_once(copy.deepcopy(layer).double(), x.double(), g.double(), **mask)
    request.getfixturevalue("routed")
    found = trained_once(layer.to(DEVICE), x.to(DEVICE), g.to(DEVICE), **device(mask))
    for a, b in zip(found, want, strict=True):
        close(a, b, torch.float32, 8, terms=1.0)


class TestRegistration:
    """Which machines take the kernels, without one that has a GPU."""

    def test_nothing_is_imported_before_a_cuda_tensor(self):
        code = (
            "import sys, torch, batchnorm; x = torch.randn(4, 3, requires_grad=True); "
            "batchnorm.BatchNorm1d(3)(x).square().sum().backward(); print('triton' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"

    @pytest.mark.parametrize(("cuda", "found"), [(None, True), ("12.8", False)])
    def test_no_cuda_or_no_triton_leaves_the_reference(self, cuda, found, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(register, "find_spec", lambda name: found or None)
        assert register.register() is None

    @pytest.mark.skipif(DEVICE == "cuda", reason="there they are registered already")
    def test_a_cuda_build_with_triton_registers_every_kernel(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        library = register.register()
        try:
            for name in OPS:
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"batchnorm::{name}", "CUDA")
        finally:
            library._destroy()

    @pytest.mark.parametrize("x", [torch.randn(0, 3, 4), torch.arange(12).view(2, 3, 2)])
    def test_what_the_kernels_do_not_cover_goes_to_the_reference(self, x):
        for found, want in zip(
            register.cuda_implementation("stats")(x, None, 0), reference.stats(x, None, 0), strict=True
        ):
            assert torch.equal(found, want)
