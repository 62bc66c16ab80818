"""`recalibrate`: each layer's statistics are the moments of what it sees in evaluation; `undo` takes all back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm
from batchnorm.inspect.modules import is_norm

from .. import parts
from ..compare import Discard, Make, Mismatch, Snapshot, quiet, reference, tool, train
from ..layers import Scope
from ..program import Case
from ..strategies import programs

__all__ = ["CASES", "check"]

_TOUCHES = (
    "eval",
    "train",
    "hook",
    "looking hook",
    "pre-hook",
    "wrapped",
    "parametrized",
    "no grad",
    "alias",
    "float counter",
)
SCOPE = Scope(touches=_TOUCHES, elsewhere=False)


@st.composite
def _cases(draw: Any) -> Case:
    layerwise = draw(st.booleans())
    # a layer of one pass normalizes by the batch, which one sample may not be enough for
    cuts = tuple(draw(st.lists(st.integers(1 if layerwise else 2, 4), min_size=1, max_size=3)))
    return Case("recalibrate", draw(programs(SCOPE)), None, (("cuts", cuts), ("layerwise", layerwise)))


CASES = _cases()


def check(make: Make, *, cuts: tuple[int, ...] = (3, 2), layerwise: bool = True) -> None:
    reference(make, lambda model, x: train(model, x, 1, backward=False))
    model, x = make()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn((n, *x.shape[1:]), generator=generator).to(x.dtype) for n in cuts]
    want = _population(make, None if layerwise else batches, batches)
    before = Snapshot(model)
    with tool(model):
        result = batchnorm.recalibrate(model, batches, layerwise=layerwise)
    if layerwise:
        want = _population(lambda: (_with_state(make, model), x), None, batches)
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    if set(result.layers) | set(result.skipped) != set(norms):
        raise Mismatch(f"the report names {[*result.layers, *result.skipped]}, and the model has {list(norms)}")
    for name in result.layers:
        norm: Any = norms[name]
        if norm.num_batches_tracked is not None and norm.num_batches_tracked != len(batches):
            raise Mismatch(f"{name} counts {norm.num_batches_tracked} batches of {len(batches)}")
        if name in want:
            _compare(name, norm, *want[name])
    result.undo()
    before.check(model, "undo")


def _with_state(make: Make, model: nn.Module) -> nn.Module:
    other, _ = make()
    with torch.no_grad():
        for ours, theirs in zip(other.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    return other


def _population(make: Make, by_batch: Any, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance, in float64, of what each layer that is called once sees of all batches."""
    model, _ = make()
    norms: dict[str, Any] = {name: module for name, module in model.named_modules() if is_norm(module)}
    left = {n for n, m in norms.items() if m.running_mean is None or (model.training and not m.training)}
    if by_batch is not None and any(getattr(norm, "renorm", None) for norm in norms.values()):
        raise Discard("renormalization in one pass depends on the order of the batches")
    model = model.double()
    for name, module in model.named_modules():
        module.training = by_batch is not None and name in norms and name not in left
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}

    def note(name: str, args: Any, kwargs: Any) -> None:
        x, mask = args[0].detach(), kwargs.get("mask")
        columns = x.transpose(0, 1).flatten(1).clone()  # what is written to later
        seen[name].append(columns if mask is None else columns[:, mask.flatten()])

    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda m, args, kwargs, n=name: note(n, args, kwargs), with_kwargs=True)
    try:
        with quiet(), torch.no_grad():
            for batch in batches:
                model(parts.scaled(batch.double(), 1.0))
    except Exception as error:
        raise Discard(f"the reference does not run: {error}") from error
    if max(Counter({name: len(calls) for name, calls in seen.items()}).values(), default=0) > len(batches) and by_batch:
        raise Discard("in one pass a layer that is called twice feeds others by the batch")
    pooled = {name: torch.cat(calls, 1) for name, calls in seen.items() if len(calls) == len(batches)}
    return {name: (x.mean(1), x.var(1)) for name, x in pooled.items() if x.shape[1] > 1 and name not in left}


def _compare(name: str, norm: Any, mean: Tensor, var: Tensor) -> None:
    tolerance = 1e-8 if norm.running_mean.dtype == torch.float64 else 1e-3
    scale = (mean.square() + var).sqrt().max().item() + 1e-3
    off = (norm.running_mean.double() - mean).abs().max().item() / scale
    if off > tolerance:
        raise Mismatch(f"the mean of {name} is off by {off:.2g} of the largest value")
    off = (norm.running_var.double() - var).abs().max().item() / scale**2
    if off > tolerance:
        raise Mismatch(f"the variance of {name} is off by {off:.2g} of the largest value")
