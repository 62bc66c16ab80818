"""Each operator against the oracle, for every dtype, layout, activation, with residual, mask and slices.

The operators are reached through the dispatcher, so the same cases hold the C++ kernels where they are built and the
reference where they are not.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.ops import ACTIVATIONS, fused, reference
from tests.oracle import close, truth

OPS = torch.ops.batchnorm
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layout(tensor, name):
    if name == "contiguous":
        return tensor.contiguous()
    if name == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = torch.stack([tensor, tensor], -1)  # "strided": every second element of a larger tensor
    return wide[..., 0]


@st.composite
def problems(draw):
    """Arguments of `forward` and a grad_output, in the dtype and layout drawn."""
    spatial = draw(st.sampled_from([(), (1,), (5,), (3, 4), (1, 17), (2, 3, 2)]))
    samples, channels = draw(st.integers(1, 9)), draw(st.integers(1, 19))
    dtype, shape = draw(st.sampled_from(DTYPES)), (samples, channels, *spatial)
    arrangement = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*size, scale=1.0, shift=0.0):
        return torch.randn(size, generator=generator) * scale + shift

    input = layout(random(*shape, scale=draw(st.sampled_from([1.0, 30.0])), shift=2.0).to(dtype), arrangement)
    vector_dtype = draw(st.sampled_from([dtype, torch.float32])) if dtype.itemsize == 2 else dtype
    affine = draw(st.sampled_from(["none", "weight", "both"]))
    weight = None if affine == "none" else random(channels, shift=0.5).to(vector_dtype)
    bias = random(channels).to(vector_dtype) if affine == "both" else None
    residual = layout(random(*shape).to(dtype), draw(st.sampled_from(["contiguous", "channels_last"])))
    positions = input[0, 0].numel()
    mask = torch.rand(samples, positions, generator=generator) < 0.7
    return {
        "input": input,
        "weight": weight,
        "bias": bias,
        "residual": residual if draw(st.booleans()) else None,
        "mask": mask if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from(["", *ACTIVATIONS])),
        "slice_size": draw(st.sampled_from([0, 0, 1, 2, 4])),
        "grad_output": layout(random(*shape).to(dtype), draw(st.sampled_from(["contiguous", "channels_last"]))),
    }


def expected(p, **more):
    names = ("residual", "mask", "activation", "slice_size", "grad_output")
    return truth(p["input"], p["weight"], p["bias"], **{n: p[n] for n in names}, negative_slope=0.2, **more)


def form(p):
    return (1e-5, p["activation"], 0.2, p["slice_size"])


@given(problems())
def test_forward_is_the_truth(p):
    want = expected(p)
    dtype = p["input"].dtype
    out, mean, var, count = OPS.forward(p["input"], p["weight"], p["bias"], p["residual"], p["mask"], *form(p))
    assert out.dtype == dtype
    close(out, want.out, dtype)
    close(mean, want.mean, torch.float64, 1e3)
    close(var, want.var, torch.float64, 1e3)
    assert torch.equal(count, want.count)


@given(problems())
def test_the_four_primitives_compose_to_the_truth(p):
    want = expected(p)
    dtype = p["input"].dtype
    given_ = (p["weight"], p["bias"], p["residual"])
    mean, var, count = OPS.stats(p["input"], p["mask"], p["slice_size"])
    close(OPS.apply(p["input"], mean, var, *given_, *form(p)), want.out, dtype)
    sums = OPS.backward_reduce(p["grad_output"], p["input"], mean, var, *given_, p["mask"], *form(p))
    dx, dres = OPS.backward_elemt(
        p["grad_output"], p["input"], mean, var, *given_, p["mask"], *sums, count, *form(p), p["residual"] is not None
    )
    compare_gradients(p, want, dx, *fused.grad_affine_vectors(*sums, var, 1e-5), dres)


def compare_gradients(p, want, dx, dweight, dbias, dresidual):
    dtype = p["input"].dtype
    gradient = p["grad_output"].abs().max().item()
    scale = (want.var + 1e-5).rsqrt().max().item() * (1 if p["weight"] is None else p["weight"].abs().max().item())
    close(dx, want.grads["input"], dtype, 4, terms=gradient * scale)
    if p["weight"] is not None:
        close(dweight, want.grads["weight"], dtype, 4, terms=gradient)
    if p["bias"] is not None:
        close(dbias, want.grads["bias"], dtype, 4, terms=gradient)
    if p["residual"] is not None:
        close(dresidual, want.grads["residual"], dtype, 4)


@given(problems())
def test_backward_is_the_truth(p):
    want = expected(p)
    given_ = (p["weight"], p["bias"], p["residual"], p["mask"])
    _, mean, var, count = OPS.forward(p["input"], *given_, *form(p))
    found = OPS.backward(p["grad_output"], p["input"], mean, var, count, *given_, *form(p), [True] * 4)
    compare_gradients(p, want, *found)


@given(problems())
def test_backward_through_fixed_moments(p):
    p["mask"], p["slice_size"] = None, 0
    channels = p["input"].size(1)
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    want = expected(p, moments=(mean, var))
    found = OPS.backward(
        p["grad_output"], p["input"], mean, var, None, p["weight"], p["bias"], p["residual"], None, *form(p), [True] * 4
    )
    compare_gradients(p, want, *found)


@given(problems(), st.lists(st.booleans(), min_size=4, max_size=4))
def test_only_the_gradients_asked_for(p, wanted):
    given_ = (p["weight"], p["bias"], p["residual"], p["mask"])
    _, mean, var, count = OPS.forward(p["input"], *given_, *form(p))
    arguments = (p["grad_output"], p["input"], mean, var, count, *given_, *form(p))
    for backward in (OPS.backward, fused.backward):
        full, some = backward(*arguments, [True] * 4), backward(*arguments, wanted)
        for complete, part, want in zip(full, some, wanted, strict=True):
            assert torch.equal(part, complete) if want else part.numel() == 0


@given(problems())
def test_padding_may_hold_anything(p):
    """NaN and Inf under the mask change no real position, forward or backward."""
    p["mask"] = torch.rand(p["input"].size(0), p["input"][0, 0].numel()) < 0.7
    p["residual"] = None
    padding = ~p["mask"].view(p["input"].size(0), 1, *p["input"].shape[2:]).expand(p["input"].shape)
    p["grad_output"] = p["grad_output"].masked_fill(padding, 0)
    dirty = p["input"].masked_fill(padding, float("nan"))
    results = []
    for input in (p["input"], dirty):
        given_ = (p["weight"], p["bias"], None, p["mask"])
        out, mean, var, count = OPS.forward(input, *given_, *form(p))
        dx, dw, db, _ = OPS.backward(p["grad_output"], input, mean, var, count, *given_, *form(p), [True] * 4)
        results.append((out.masked_fill(padding, 0), mean, var, dx.masked_fill(padding, 0), dw, db))
        assert not dx.isnan().any()
    for clean, padded in zip(*results, strict=True):
        close(padded, clean.double(), p["input"].dtype)  # masked_fill may change a layout, and so the order of a sum


@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
def test_output_keeps_the_layout(arrangement):
    x = layout(torch.randn(4, 3, 5, 6), arrangement)
    out, mean, var, count = OPS.forward(x, None, None, None, None, 1e-5, "relu", 0.01, 0)
    assert out.stride() == x.stride()
    dx = OPS.backward(out, x, mean, var, count, None, None, None, None, 1e-5, "relu", 0.01, 0, [True] + [False] * 3)[0]
    assert dx.stride() == x.stride()


EXTREMES = [(1e6, 1.0), (0.0, 1e18), (1e30, 1e30), (0.0, 1e-30), (0.0, 1e-42), (3.0, 0.0)]


@pytest.mark.parametrize(("mean", "sd"), EXTREMES)
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last"])
def test_extreme_inputs_in_float32(mean, sd, arrangement):
    x = layout((torch.randn(16, 4, 9, 9, dtype=torch.float64) * sd + mean).float(), arrangement)
    g = torch.randn_like(x)
    want = truth(x, grad_output=g)
    out, m, v, count = OPS.forward(x, None, None, None, None, 1e-5, "", 0.01, 0)
    dx = OPS.backward(g, x, m, v, count, None, None, None, None, 1e-5, "", 0.01, 0, [True] + [False] * 3)[0]
    close(out, want.out, torch.float32)
    close(dx, want.grads["input"], torch.float32, 4)


def test_empty_batch():
    x = torch.randn(0, 3, 4)
    for slice_size in (0, 2):
        out, mean, var, count = OPS.forward(x, None, None, None, None, 1e-5, "", 0.01, slice_size)
        assert out.shape == x.shape
        assert count.tolist() == [0.0]
        assert mean.abs().sum() == var.abs().sum() == 0


def cases_for_opcheck():
    x, w, b = torch.randn(4, 3, 5), torch.rand(3), torch.randn(3)
    r, g, mask = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.rand(4, 5) < 0.5
    mean, var, count = reference.stats(x, mask, 2)
    form = (1e-5, "silu", 0.01, 2)
    sums = reference.backward_reduce(g, x, mean, var, w, b, r, mask, *form)
    yield "stats", (x, mask, 2)
    yield "apply", (x, mean, var, w, b, r, *form)
    yield "backward_reduce", (g, x, mean, var, w, b, r, mask, *form)
    yield "backward_elemt", (g, x, mean, var, w, b, r, mask, *sums, count, *form, True)
    yield "backward_elemt", (g, x, mean, var, w, None, None, None, None, None, None, *form, False)
    yield "forward", (x, w, b, r, mask, *form)
    yield "backward", (g, x, mean, var, count, w, b, r, mask, *form, [True, True, False, True])
    buffers = (torch.zeros(3), torch.ones(3), torch.tensor(0))
    yield "update_running_", (*buffers, mean, var, count, 0.1, True)
    yield "update_running_", (None, None, None, mean, var, count, 0.1, False)


@pytest.mark.parametrize(("name", "arguments"), list(cases_for_opcheck()))
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(OPS, name).default, arguments)
