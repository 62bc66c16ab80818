"""How far two models' outputs are apart, and how far they may be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TOLERANCES", "Comparison", "compare"]

# Of the largest output: what rounding in the other order of operations amounts to in deep networks.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Comparison(NamedTuple):
    """The largest difference, over how many numbers in how many outputs."""

    difference: float
    compared: int
    outputs: int


def compare(ours: list[Tensor], reference: list[Tensor]) -> Comparison:
    """The largest |difference| relative to the tensor's largest |value|; infinite where NaN, shapes or integers differ,
    NaN where there is no finite floating-point number to compare."""
    apart = Comparison(math.inf, 0, 0)
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in reference]:
        return apart
    worst, numbers = 0.0, []
    for a, b in zip(ours, reference, strict=True):
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return apart
            continue
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not a[finite].isfinite().all():
            return apart
        if finite.any():
            scale = b[finite].abs().max().item() or 1.0
            worst = max(worst, (a[finite] - b[finite]).abs().max().item() / scale)
            numbers.append(int(finite.sum()))
    return Comparison(worst if numbers else math.nan, sum(numbers), len(numbers))
