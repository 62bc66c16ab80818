"""The float64 truth: batch normalization written from its definition, one slice at a time, derived by autograd.

It shares no code with the package. Results are float64 and contiguous; errors are measured against them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATION = {
    "": lambda z, _: z,
    "relu": lambda z, _: torch.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope),
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
}


@dataclass
class Truth:
    out: Tensor
    mean: Tensor  # (R, C)
    var: Tensor  # (R, C), biased
    count: Tensor  # (R,)
    grads: dict[str, Tensor]


def exact(tensor: Tensor | None, requires_grad: bool = True) -> Tensor | None:
    """A contiguous float64 leaf of the same values."""
    if tensor is None:
        return None
    return tensor.detach().double().contiguous().clone().requires_grad_(requires_grad)


def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return (x - mean.view(shape)) / torch.sqrt(var.view(shape) + eps)


def truth(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    activation: str = "",
    negative_slope: float = 0.01,
    slice_size: int = 0,
) -> Truth:
    """Forward and, with a `grad_output`, backward. `mask` is (N, S) over the flattened positions."""
    leaves = {"input": exact(input), "weight": exact(weight), "bias": exact(bias), "residual": exact(residual)}
    x = leaves["input"]
    pieces = x.split(slice_size or max(1, len(x))) if len(x) else [x]
    masks = [None] * len(pieces) if mask is None else mask.split(slice_size or max(1, len(x)))
    hats, means, variances, counts = [], [], [], []
    for piece, real in zip(pieces, masks, strict=True):
        columns = piece.transpose(0, 1).flatten(1)
        if real is not None:
            columns = columns[:, real.flatten()]
        n = columns.size(1)
        if moments is not None:
            mean, var = (m.detach().double() for m in moments)
        elif n:
            mean = columns.mean(1)
            var = (columns - mean[:, None]).square().mean(1)
        else:
            mean = var = columns.new_zeros(columns.size(0))
        hats.append(normalize(piece, mean, var, eps))
        means.append(mean.detach())
        variances.append(var.detach())
        counts.append(float(n))
    z = torch.cat(hats)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        z = z * leaves["weight"].view(shape)
    if bias is not None:
        z = z + leaves["bias"].view(shape)
    if residual is not None:
        z = z + leaves["residual"]
    out = ACTIVATION[activation](z, negative_slope)
    grads: dict[str, Tensor] = {}
    if grad_output is not None:
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        found = torch.autograd.grad(out, list(wanted.values()), grad_output.double())
        grads = dict(zip(wanted, found, strict=True))
    return Truth(out.detach(), torch.stack(means), torch.stack(variances), torch.tensor(counts).double(), grads)


# Relative to the largest value of what is compared. One rounding of the result, and of the few that an activation
# or a sum adds, in the dtype's unit roundoff (2⁻²⁴, 2⁻⁵³, 2⁻⁸, 2⁻¹¹).
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0, terms: float = 0.0) -> None:
    """Assert that `actual` is `expected` to the dtype's rounding, relative to the largest magnitude.

    `terms` is the size of what was summed, where the sum may cancel (the gradient of two values a channel is nearly 0).
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return
    assert torch.equal(actual.isnan(), expected.isnan())
    scale = expected.nan_to_num().abs().max().clamp(min=max(terms, 1e-300))
    # below the normal range a rounding is one fixed step, however small the values
    scale = scale.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / TOLERANCE[dtype])
    error = ((actual.double() - expected).nan_to_num().abs().max() / scale).item()
    assert error <= factor * TOLERANCE[dtype], f"relative error {error:.3g} at {dtype}"
