"""Every keyword with every other: the table in docs/variants/README.md, executed.

The reference is the composition written out: the moments of (slices of) the real positions, corrected toward the
running statistics, in float64 and derived by autograd. The synchronized column runs in tests/distributed.
"""

import itertools

import pytest
import torch
from torch import nn

from batchnorm import BatchNormAct1d, BatchNormAct2d, Renorm, lengths_to_mask
from tests.oracle import ACTIVATION

KEYWORDS = {
    "activation": {"activation": "silu"},
    "ghost": {"ghost_batch_size": 3},
    "renorm": {"renorm": Renorm(1.3, 0.2)},
    "skip": {"nonfinite": "skip"},
    "domains": {"domains": 2},
    "accumulation": {"accumulation_steps": 2},
    "momentum": {"momentum": None},
}
PAIRS = [(), *((name,) for name in KEYWORDS), *itertools.combinations(KEYWORDS, 2), tuple(KEYWORDS)]


def written_out(x, residual, mask, weight, bias, running, keywords):
    """One call in training, in float64; returns the output and what the buffers should average in."""
    slices = x.split(keywords.get("ghost_batch_size") or len(x))
    masks = [None] * len(slices) if mask is None else mask.split(keywords.get("ghost_batch_size") or len(x))
    shape = (1, -1) + (1,) * (x.dim() - 2)
    parts, rows = [], []
    for piece, real in zip(slices, masks, strict=True):
        columns = piece.transpose(0, 1).flatten(1)
        columns = columns if real is None else columns[:, real.flatten()]
        mean, var = columns.mean(1), columns.var(1, correction=0)
        sigma = (var + 1e-5).sqrt()
        hat = (piece - mean.view(shape)) / sigma.view(shape)
        if "renorm" in keywords:
            spread = (running[1].double() + 1e-5).sqrt()
            r = (sigma / spread).clamp(1 / 1.3, 1.3).detach()
            d = ((mean - running[0].double()) / spread).clamp(-0.2, 0.2).detach()
            hat = hat * r.view(shape) + d.view(shape)
        parts.append(hat)
        rows.append((mean.detach(), var.detach(), columns.size(1)))
    z = torch.cat(parts) * weight.view(shape) + bias.view(shape) + residual
    return ACTIVATION[keywords.get("activation", "")](z, 0.01), rows


def moments_of(calls, ghost):
    """The mean and unbiased variance that the union of the calls gives the buffers."""
    rows = [row for call in calls for row in call]
    total = sum(n for *_, n in rows)
    mean = sum(n * m for m, _, n in rows) / total
    if ghost:
        return mean, sum(n * v for _, v, n in rows) / sum(n - 1 for *_, n in rows)
    return mean, sum(n * (v + (m - mean).square()) for m, v, n in rows) / (total - 1)


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last", "sequence"])
def test_composition(names, masked, arrangement):
    keywords = {key: value for name in names for key, value in KEYWORDS[name].items()}
    spatial = (7,) if arrangement == "sequence" else (2, 3)
    kind, axis = (BatchNormAct1d, -1) if arrangement == "sequence" else (BatchNormAct2d, 1)
    composite = kind(4, dtype=torch.float64, feature_axis=axis, **{"activation": None} | keywords)
    layer = composite.norm
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    domain = 1 if "domains" in names else 0
    mask = None
    if masked:
        lengths = (
            torch.tensor([7, 5, 6, 7, 2, 7, 4, 3]) if arrangement == "sequence" else torch.tensor([6, 5, 6, 2] * 2)
        )
        mask = lengths_to_mask(lengths, 7 if arrangement == "sequence" else 6).view(8, *spatial)
    expected, calls, average = [t.clone().double() for t in layer.memory(domain)[:3]], [], None
    for _step in range(4):
        x, residual, g = (torch.randn(8, 4, *spatial, dtype=torch.float64) for _ in range(3))
        leaves = [t.clone().requires_grad_() for t in (x, residual, layer.weight.detach(), layer.bias.detach())]
        want, rows = written_out(
            *leaves[:2], None if mask is None else mask.flatten(1), *leaves[2:], expected, keywords
        )
        wanted = torch.autograd.grad(want, leaves, g)
        mine = [t.clone().requires_grad_() for t in (x, residual)]
        seen = [arranged(t, arrangement) for t in mine]
        out = composite(*seen, mask, domain) if "domains" in names else composite(*seen, mask)
        out = out.movedim(axis, 1)
        found = torch.autograd.grad(out, [*mine, layer.weight, layer.bias], g)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(found, wanted)
        calls.append(rows)
        if len(calls) == keywords.get("accumulation_steps", 1):
            average = moments_of(calls, keywords.get("ghost_batch_size"))
            calls.clear()
            expected[2] += 1
            factor = 1 / expected[2] if "momentum" in names else 0.1
            for buffer, new in zip(expected[:2], average, strict=True):
                buffer.lerp_(new, float(factor))
    for buffer, value in zip(layer.memory(domain)[:3], expected, strict=True):
        torch.testing.assert_close(buffer.double(), value)


def arranged(tensor, arrangement):
    if arrangement == "sequence":
        return tensor.movedim(1, -1)
    return tensor.to(memory_format=torch.channels_last) if arrangement == "channels_last" else tensor


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_composition_takes_every_dtype_and_evaluates_plainly(names, dtype):
    keywords = {key: value for name in names for key, value in KEYWORDS[name].items()}
    layer = BatchNormAct2d(4, **{"activation": None} | keywords)
    x = torch.randn(6, 4, 3, 3).to(dtype).requires_grad_()
    out = layer(x, mask=torch.rand(6, 3, 3) < 0.8)
    out.backward(torch.randn(out.shape).to(dtype))
    assert out.dtype == x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    plain = nn.BatchNorm2d(4).eval()
    plain.load_state_dict({k: v for k, v in layer.norm.state_dict().items() if not k.startswith("domain_")})
    want = plain(x.detach())
    want = nn.functional.silu(want) if "activation" in names else want
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(layer.eval()(x.detach()), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "names", [("ghost",), ("renorm",), ("activation", "ghost"), ("ghost", "renorm"), ("accumulation",)]
)
def test_compositions_compile_without_a_graph_break(names):
    torch._dynamo.reset()  # of one forward only so many variants are kept: those of other tests count
    keywords = {key: value for name in names for key, value in KEYWORDS[name].items()}
    compiled_layer, eager = (BatchNormAct1d(3, **{"activation": None} | keywords) for _ in range(2))
    compiled = torch.compile(compiled_layer, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([True] * 5 + [False])
    for _ in range(2):
        x, g = torch.randn(6, 3), torch.randn(6, 3)
        grads = []
        for call in (compiled, eager):
            leaf = x.clone().requires_grad_()
            call(leaf, mask=mask).backward(g)
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(compiled_layer.state_dict(), eager.state_dict())
