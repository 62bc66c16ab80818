"""The Triton kernels against the oracle, by Triton's interpreter on the CPU, with tensors cut in every way."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st

from ...oracle import close
from ..compare import Discard, Mismatch
from ..problems import Problem, problems
from ..program import Case

__all__ = ["CASES", "Kernels", "Problem", "check"]


@dataclass(frozen=True)
class Kernels:
    problem: Problem
    tile: int = 16384  # elements
    fused: int = 8192  # values that one launch reduces and applies
    primitives: bool = False

    def features(self) -> set[str]:
        words = self.problem.features() | {f"tile {self.tile}", f"fused {self.fused}"}
        return words | ({"primitives"} if self.primitives else set())

    def __repr__(self) -> str:
        rest = f"tile={self.tile}, fused={self.fused}, primitives={self.primitives}"
        return f"Kernels(triton.{self.problem!r}, {rest})"


CASES = st.builds(
    lambda *parts: Case("triton", problem=Kernels(*parts)),
    problems(("float32", "bfloat16", "float16", "float64"), largest=17),
    st.sampled_from([16384, 16, 32, 64]), st.sampled_from([8192, 1, 20]), st.booleans(),
)  # fmt: skip


def check(kernels: Kernels) -> None:
    try:
        from batchnorm.ops import register
        from batchnorm.ops.triton import launch
    except ImportError as error:
        raise Discard("no Triton here") from error
    p, tensors = kernels.problem, kernels.problem.tensors()
    want = p.truth(tensors)
    form = (p.eps, p.activation, 0.2, p.ghost)
    flat = None if tensors["mask"] is None else tensors["mask"].reshape(p.shape[0], -1)
    affine = (tensors["weight"], tensors["bias"], tensors["residual"])
    x, grad = tensors["input"], tensors["grad_output"]
    with warnings.catch_warnings(), mock.patch.multiple(launch, MAX_TILE=kernels.tile, MAX_FUSED=kernels.fused):
        warnings.simplefilter("ignore")  # NumPy's, where a GPU is silent
        if kernels.primitives:
            mean, var, count = register.kernel("stats")(x, flat, p.ghost)
            out = register.kernel("apply")(x, mean, var, *affine, *form)
            sums = register.kernel("backward_reduce")(grad, x, mean, var, *affine, flat, *form)
            dx, dres = register.kernel("backward_elemt")(
                grad, x, mean, var, *affine, flat, *sums, count, *form, tensors["residual"] is not None
            )
            found = (dx, None, None, dres)
        else:
            out, mean, var, count = register.kernel("forward")(x, *affine, flat, *form)
            needs = [True, tensors["weight"] is not None, tensors["bias"] is not None, tensors["residual"] is not None]
            found = register.kernel("backward")(grad, x, mean, var, count, *affine, flat, *form, needs)
    _compare(p, tensors, want, (out, mean, var, count), found)


def _compare(p: Problem, tensors: dict[str, Any], want: Any, forward: Any, found: Any) -> None:
    out, mean, var, count = forward
    dtype = getattr(torch, p.dtype)
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    # no wider type holds the mean of float64 data: its rounding counts as |mean|/sd units, in the truth as well
    more = 100 + abs(p.shift) / p.scale if dtype == torch.float64 else 1
    gradient = tensors["grad_output"].abs().max().item()
    largest = 1.0 if tensors["weight"] is None else tensors["weight"].abs().max().item()
    terms = gradient * largest * (want.var + p.eps).rsqrt().max().item()
    try:
        if out.dtype != dtype or not torch.equal(count, want.count):
            raise Mismatch(f"dtype {out.dtype}, counts {count.tolist()}")
        close(out, want.out, dtype, 2 * more)
        close(mean, want.mean, vectors, 10 * more, abs(p.shift) + p.scale)
        close(var, want.var, vectors, 10 * more)
        for name, tensor in zip(("input", "weight", "bias", "residual"), found, strict=True):
            if tensor is not None and tensors[name] is not None:
                close(tensor, want.grads[name], dtype, 8 * more, terms if name == "input" else gradient)
    except AssertionError as error:
        raise Mismatch(f"{error}") from error
