"""One call of a normalization as data: its tensors, its keywords, and the float64 truth for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.ops import ACTIVATIONS

from ..oracle import Truth, truth
from .compare import Discard
from .parts import arranged

__all__ = ["LAYOUTS", "Problem", "problems"]

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


@dataclass(frozen=True)
class Problem:
    shape: tuple[int, ...]
    dtype: str = "float32"
    vector_dtype: str = "float32"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    residual: str = ""  # its layout
    affine: str = "both"
    activation: str = ""
    ghost: int = 0
    mask: float = 0.0  # the share of padding
    shift: float = 0.0
    scale: float = 1.0
    eps: float = 1e-5
    seed: int = 0

    def features(self) -> set[str]:
        words = {self.dtype, self.layout, self.activation, f"grad {self.grad_layout}", f"affine {self.affine}"}
        words |= {"residual"} if self.residual else set()
        words |= {"ghost"} if self.ghost else set()
        words |= {"mask"} if self.mask else set()
        return words | {f"{len(self.shape)} axes", f"scale {self.scale:g}", f"shift {self.shift:g}"}

    def tensors(self) -> dict[str, Any]:
        """The arguments of `tests.oracle.truth`, some of them None."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype, vectors = getattr(torch, self.dtype), getattr(torch, self.vector_dtype)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        channels = self.shape[1]
        values = (random(*self.shape) * self.scale + self.shift).to(dtype)
        found: dict[str, Any] = {
            "input": arranged(values, self.layout),
            "grad_output": arranged(random(*self.shape).to(dtype), self.grad_layout),
            "residual": arranged(random(*self.shape).to(dtype), self.residual) if self.residual else None,
            "weight": None if self.affine == "none" else (random(channels) + 0.5).to(vectors),
            "bias": random(channels).to(vectors) if self.affine == "both" else None,
        }
        positions = torch.rand(self.shape[0], *self.shape[2:], generator=generator) >= self.mask
        return found | {"mask": positions if self.mask else None}

    def truth(self, tensors: dict[str, Any], **more: Any) -> Truth:
        flat = None if tensors["mask"] is None else tensors["mask"].reshape(self.shape[0], -1)
        names = ("weight", "bias", "grad_output", "residual")
        form = {"eps": self.eps, "activation": self.activation, "negative_slope": 0.2, "slice_size": self.ghost}
        found = truth(tensors["input"], **{n: tensors[n] for n in names}, mask=flat, **(form | more))
        if self.dtype == "float64" and (found.var < 1e-20 * (1 + found.mean.square())).any():
            raise Discard("a constant channel: x - mean is rounding, in the truth as well")
        return found


@st.composite
def problems(draw: Any, dtypes: tuple[str, ...], largest: int = 40) -> Problem:
    dims = draw(st.integers(0, 3))
    longest = {0: 1, 1: largest, 2: 9, 3: 4}[dims]
    sizes = tuple(draw(st.integers(1, longest)) for _ in range(dims))
    dtype = draw(st.sampled_from(dtypes))
    half = dtype in ("bfloat16", "float16")
    vectors = draw(st.sampled_from(["float32", dtype])) if half else dtype
    return Problem(
        (draw(st.integers(1, 7)), draw(st.integers(1, 19 if not dims else 5)), *sizes), dtype, vectors,
        draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(["", "", "contiguous", "channels_last", "sliced"])),
        draw(st.sampled_from(["both", "both", "weight", "none"])), draw(st.sampled_from(["", *ACTIVATIONS])),
        draw(st.sampled_from([0, 0, 0, 1, 2, 3])), draw(st.sampled_from([0.0, 0.0, 0.3, 0.8])),
        draw(st.sampled_from([0.0, 2.0] if half else [0.0, 2.0, 1e3])),
        draw(st.sampled_from([1.0, 30.0] if half else [1.0, 30.0, 1e-3, 1e10])),
        draw(st.sampled_from([1e-5, 1e-3, 0.1])), draw(st.integers(0, 999)),
    )  # fmt: skip
