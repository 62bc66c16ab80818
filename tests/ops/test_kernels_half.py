"""16-bit data in the compiled kernels: moments without a shift, bfloat16 taken two neighbors at a time."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.ops import extension

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="the extension was not built here")

ops = torch.ops.batchnorm
HALF = (torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")


def arranged(t: Tensor, layout: str) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else t.contiguous()


def one_step_up(ones: Tensor) -> Tensor:
    return (ones.view(torch.int16) + 1).view(ones.dtype)


def hard_values(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    """n values whose variance is lost where Σx² - (Σx)²/n is taken carelessly, or whose squares leave float32."""
    ones, numbers = torch.ones(n, dtype=dtype), torch.randn(n, generator=torch.Generator().manual_seed(n))
    if kind == "one value a step above all others":
        ones[n // 3] = one_step_up(ones[:1])[0]
        return ones
    if kind == "half of them a step above":
        return torch.where(numbers > 0, one_step_up(ones), ones)
    if kind == "one tiny value among ones":
        ones[n // 2] = 6e-8
        return ones
    scale = {"large": 5e37 if dtype == torch.bfloat16 else 1e4, "subnormal": 1e-39 if dtype == torch.bfloat16 else 1e-6}
    return (numbers * scale.get(kind, 1.0) + (1000 if kind == "far from zero" else 0)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("samples", [3, 1000])  # a part of a chunk; several chunks
@pytest.mark.parametrize(
    "kind",
    [
        "one value a step above all others",
        "half of them a step above",
        "one tiny value among ones",
        "far from zero",
        "large",
        "subnormal",
        "plain",
    ],
)
def test_moments_are_those_of_rational_arithmetic(kind: str, samples: int, dtype: torch.dtype, layout: str) -> None:
    n = samples * 13
    values = hard_values(kind, n, dtype)
    x = arranged(values.view(samples, 1, 13).repeat(1, 35, 1), layout)
    mean, var, _ = ops.stats(x, None, 0)
    exact = [Fraction(v) for v in values.tolist()]
    true_mean = sum(exact) / n
    true_var = sum((v - true_mean) ** 2 for v in exact) / n
    sd = max(float(true_var) ** 0.5, 1e-300)
    assert (mean - float(true_mean)).abs().max() <= 1e-12 * sd
    assert (var - float(true_var)).abs().max() <= 1e-12 * float(true_var)


@given(
    channels=st.integers(1, 100),
    length=st.integers(1, 100),
    layout=st.sampled_from(LAYOUTS),
    exponent=st.integers(-130, 100),
    seed=st.integers(0, 2**31),
)
def test_bfloat16_is_rounded_as_torch_rounds(channels: int, length: int, layout: str, exponent: int, seed: int) -> None:
    """With mean 0 and variance 1 a float32 product is all that is rounded: bit for bit, ties and subnormals too."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(2, channels, length, generator=generator) * 2.0**exponent
    x = arranged(numbers.to(torch.bfloat16), layout)
    # few bits, so that many products lie in the middle between two neighbors
    weight = torch.randint(1, 512, (channels,), generator=generator) / 256.0
    zeros = torch.zeros(channels, dtype=torch.float64)
    out = ops.apply(x, zeros, zeros + 1, weight, None, None, 0.0, "", 0.0, 0)
    want = (x.float() * weight[:, None] + 0.0).to(torch.bfloat16)
    assert torch.equal(out.contiguous().view(torch.int16), want.contiguous().view(torch.int16))
