"""Whether convert, revert, fold and fuse leave a network's answers what they were, in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.inspect.modules import is_norm
from batchnorm.model_tools import convert, fold, fuse, revert

__all__ = ["LIMIT", "differences"]

LIMIT = 1e-6  # three training steps of a deep network amplify rounding; a mistake is of the size of the values


def steps(model: Any, holder: nn.Module, x: Tensor, count: int) -> list[Tensor]:
    """Outputs and gradients of SGD steps on batches of two sizes in turn, then parameters and buffers."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(holder.parameters(), lr=1e-3, momentum=0.9)
    seen: list[Tensor] = []
    for size in (len(x), len(x) - 1, len(x))[:count]:
        optimizer.zero_grad()
        out = model(x[:size])
        out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype) / out.numel())
        seen += [out.detach(), *(p.grad.clone() for p in holder.parameters() if p.grad is not None)]
        optimizer.step()
    return seen + [value.double() for value in holder.state_dict().values()]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference relative to its tensor's largest value (or to 1e-3, where that is smaller)."""
    scales = [max(float(b.abs().max()), 1e-3) for b in theirs]
    return max(float((a - b).abs().max()) / scale for a, b, scale in zip(ours, theirs, scales, strict=True))


def differences(model: nn.Module, x: Tensor, count: int = 3) -> dict[str, float]:
    """The largest relative difference of `converted` and `fused` to eager over so many training steps (outputs,
    gradients, parameters, buffers), of `reverted` to the network as it was, and of `folded` in eval.

    Raises:
        AssertionError: `revert` did not bring back torch's own layers under the same names, or all samples give the
            same output, so that equality would show nothing.
    """
    model, x = copy.deepcopy(model).double().train(), x.double()
    converted, fused = copy.deepcopy(model), copy.deepcopy(model)
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    evaluated, other = copy.deepcopy(model).eval(), torch.randn_like(x)
    with torch.no_grad():
        if evaluated(other).std(0).max() < 1e-6:
            raise AssertionError("the network says the same of every image")
        there_and_back = revert(convert(copy.deepcopy(evaluated)))
        found = {
            "folded": worst([fold(evaluated, (x,)).model(other)], [evaluated(other)]),
            "reverted": worst([there_and_back(other)], [evaluated(other)]),
        }
    if list(there_and_back.state_dict()) != names or [type(m) for m in there_and_back.modules()] != kinds:
        raise AssertionError("revert did not bring the network back")
    if any(type(m) in kinds for m in convert(converted).modules() if is_norm(m)):
        raise AssertionError("convert left a layer of torch's")
    expected = steps(model, model, x, count)
    torch._dynamo.reset()
    return found | {
        "converted": worst(steps(converted, converted, x, count), expected),
        "fused": worst(steps(fuse(fused), fused, x, count), expected),
    }
