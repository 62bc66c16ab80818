"""Our layers against the oracle (one call, forward and backward) and against torch's layer (several calls)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import batchnorm

from ...oracle import close
from ..compare import Discard, Mismatch, quiet
from ..problems import Problem, problems
from ..program import Case

__all__ = ["CASES", "Layer", "Problem", "check"]


@dataclass(frozen=True)
class Layer:
    """A layer and the calls that it gets: one problem after the other, all with the first one's channels."""

    problem: Problem
    momentum: float | None = 0.1
    track: bool = True
    calls: int = 2
    composite: bool = False
    inplace: bool = False
    feature_axis: int = 1
    training: bool = True
    mixed: str = ""  # "domain" or "skip": an option that changes nothing here

    def features(self) -> set[str]:
        words = {name for name in ("composite", "inplace", "training") if getattr(self, name)}
        words |= {f"momentum {self.momentum}", f"axis {self.feature_axis}", self.mixed, f"track {self.track}"}
        return words | self.problem.features()

    def __repr__(self) -> str:
        defaults = Layer(self.problem)
        changed = [n for n in self.__dict__ if n != "problem" and getattr(self, n) != getattr(defaults, n)]
        given = "".join(f", {name}={getattr(self, name)!r}" for name in changed)
        return f"Layer(layers.{self.problem!r}{given})"


@st.composite
def _layers(draw: Any) -> Case:
    problem = draw(problems(("float32", "float64", "bfloat16", "float16")))
    layer = Layer(
        problem, draw(st.sampled_from([0.1, None, 1.0, 0.5])), draw(st.integers(0, 4)) != 4, draw(st.integers(1, 3)),
        draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([1, 1, -1])), draw(st.integers(0, 3)) != 3,
        draw(st.sampled_from(["", "", "domain", "skip"])),
    )  # fmt: skip
    return Case("layers", problem=layer)


CASES = _layers()


def check(layer: Layer) -> None:
    problem, dtype = layer.problem, getattr(torch, layer.problem.dtype)
    slices = problem.ghost or problem.shape[0]
    per_slice = min(slices, problem.shape[0]) * (
        torch.Size(problem.shape).numel() // (problem.shape[0] * problem.shape[1])
    )
    training = layer.training or not layer.track
    if training and per_slice < 2:
        raise Discard("one value a channel")
    with quiet():
        made = _make(layer)
        kept: list[Any] = []
        for call in range(layer.calls):
            p = Problem(**(problem.__dict__ | {"seed": problem.seed + call}))
            tensors = p.tensors()
            if not layer.composite:
                tensors["residual"] = None
            _load(made, tensors)
            kept.append(_one_call(layer, p, made, tensors, dtype, training))
        if layer.track and layer.training:
            _check_buffers(layer, made, kept)


def _make(layer: Layer) -> Any:
    problem = layer.problem
    dims = max(1, len(problem.shape) - 2)
    options: dict[str, Any] = {"domain": {"domains": 2}, "skip": {"nonfinite": "skip"}, "": {}}[layer.mixed]
    given = {
        "momentum": layer.momentum, "track_running_stats": layer.track, "affine": problem.affine != "none",
        "eps": problem.eps, "bias": problem.affine == "both", "ghost_batch_size": problem.ghost or None,
        "feature_axis": layer.feature_axis, "dtype": getattr(torch, problem.vector_dtype), **options,
    }  # fmt: skip
    if not layer.composite:
        return getattr(batchnorm, f"BatchNorm{dims}d")(problem.shape[1], **given).train(layer.training)
    kind = getattr(batchnorm, f"BatchNormAct{dims}d")
    word = problem.activation or None
    made = kind(problem.shape[1], word, negative_slope=0.2, inplace=layer.inplace, **given)
    return made.train(layer.training)


def _load(made: Any, tensors: dict[str, Any]) -> None:
    norm = getattr(made, "norm", made)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if getattr(norm, name) is not None:
                getattr(norm, name).copy_(tensors[name])
        norm.zero_grad()
        if not norm.training and norm.running_mean is not None:
            norm.running_mean.fill_(0.25)
            norm.running_var.fill_(2.0)


def _one_call(layer: Layer, p: Problem, made: Any, tensors: dict[str, Any], dtype: torch.dtype, training: bool) -> Any:
    norm = getattr(made, "norm", made)
    # the truth is float64 too: where the input is, x - mean rounds there as it does here
    more: dict[str, Any] = {} if layer.composite else {"activation": ""}
    if not training:
        more |= {"moments": (norm.running_mean, norm.running_var), "slice_size": 0}
    want = p.truth(tensors, **more)
    invstd = (want.var.clamp(min=0) + p.eps).rsqrt().max().item()
    noise = tensors["input"].abs().max().item() * invstd if dtype == torch.float64 else 0.0
    leaf = tensors["input"].detach().requires_grad_()
    residual = None if tensors["residual"] is None else tensors["residual"].detach().requires_grad_()
    axis = layer.feature_axis
    given: dict[str, Any] = {"mask": tensors["mask"]}
    if residual is not None:
        given["residual"] = residual.movedim(1, axis)
    x = leaf * 1 if layer.inplace else leaf
    out = made(x.movedim(1, axis), **given)
    out.backward(tensors["grad_output"].movedim(1, axis))
    z = p.truth(tensors | {"grad_output": None}, **(more | {"activation": ""})).out.abs().max().item()
    _close("output", out.movedim(axis, 1), want.out, dtype, 2, z + noise if p.activation else noise)
    gradient = tensors["grad_output"].abs().max().item()
    largest = 1.0 if tensors["weight"] is None else tensors["weight"].abs().max().item()
    # a hat of n values is at most √n; each of its roundings enters dx once
    terms = gradient * largest * invstd * (1 + noise + (z if p.activation else 0))
    _close("gradient input", leaf.grad, want.grads["input"], dtype, 8, terms)
    vectors = getattr(torch, p.vector_dtype)
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            coarse = vectors if vectors.itemsize <= dtype.itemsize else dtype
            _close(
                f"gradient {name}", getattr(norm, name).grad, want.grads[name], coarse, 8, gradient * (1 + noise + z)
            )
    if residual is not None:
        _close("gradient residual", residual.grad, want.grads["residual"], dtype, 8, gradient * (1 + z))
    return want


def _check_buffers(layer: Layer, made: Any, kept: list[Any]) -> None:
    norm = getattr(made, "norm", made)
    mean = torch.zeros(layer.problem.shape[1], dtype=torch.float64)
    var = torch.ones_like(mean)
    for step, want in enumerate(kept, 1):
        weights = want.count / want.count.sum().clamp(min=1)
        batch_mean = (weights[:, None] * want.mean).sum(0)
        freedom = (want.count - 1).clamp(min=0).sum()
        if freedom == 0:
            raise Discard("no variance to remember")
        batch_var = (want.count[:, None] * want.var).sum(0) / freedom
        m = 1 / step if layer.momentum is None else layer.momentum
        mean, var = (1 - m) * mean + m * batch_mean, (1 - m) * var + m * batch_var
    dtype = norm.running_mean.dtype
    _close("running_mean", norm.running_mean, mean, dtype, 4, layer.problem.shift + layer.problem.scale)
    noise = layer.problem.shift**2 * 1e-6 if dtype == torch.float64 else 0.0  # of the truth
    _close("running_var", norm.running_var, var, dtype, 8, noise)
    if norm.num_batches_tracked != len(kept):
        raise Mismatch(f"num_batches_tracked is {norm.num_batches_tracked} after {len(kept)} calls")


def _close(what: str, found: Tensor, want: Tensor, dtype: torch.dtype, factor: float = 2, terms: float = 0.0) -> None:
    if want.abs().max() > torch.finfo(dtype).max:
        return
    try:
        # float64: a sum of n terms, each rounded; the truth is no better
        close(found.detach(), want, dtype, factor * (100 if dtype == torch.float64 else 1), terms)
    except AssertionError as error:
        raise Mismatch(f"{what}: {error}") from error
