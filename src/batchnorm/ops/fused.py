"""What the fused operators mean: compositions of the four primitives, and the update of the buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import extension, reference


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if input.device.type == "cpu" and not extension.LOADED:
        extension.say_slower()
    mean, var, count = reference.stats(input, mask, slice_size)
    out = reference.apply(input, mean, var, weight, bias, residual, eps, activation, negative_slope, slice_size)
    return out, mean, var, count


def grad_affine_vectors(sum_dy: Tensor, sum_dy_xmu: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(Σ dz·x̂, Σ dz), the gradients of weight and bias, from the rows of sums."""
    invstd = (var.double().reshape(-1, var.size(-1)) + eps).rsqrt()
    return (sum_dy_xmu * invstd).sum(0), sum_dy.sum(0)


def backward(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = input.new_empty(0)
    grad_input, grad_weight, grad_bias, grad_residual = empty, empty, empty, empty
    sum_dy = sum_dy_xmu = None
    if output_mask[1] or output_mask[2] or (output_mask[0] and count is not None):
        sum_dy, sum_dy_xmu = reference.backward_reduce(
            grad_output,
            input,
            mean,
            var,
            weight,
            bias,
            residual,
            mask,
            eps,
            activation,
            negative_slope,
            slice_size,
        )
        along_weight, along_bias = grad_affine_vectors(sum_dy, sum_dy_xmu, var, eps)
        if output_mask[1] and weight is not None:
            grad_weight = along_weight.to(weight.dtype)
        if output_mask[2] and bias is not None:
            grad_bias = along_bias.to(bias.dtype)
    if output_mask[0] or output_mask[3]:
        count = count if sum_dy is not None else None  # without the sums nothing passes through the moments
        grad_input, grad_residual = reference.backward_elemt(
            grad_output, input, mean, var, weight, bias, residual, mask, sum_dy, sum_dy_xmu, count,
            eps, activation, negative_slope, slice_size, output_mask[3],
        )  # fmt: skip
    return grad_input if output_mask[0] else empty, grad_weight, grad_bias, grad_residual


def pooled(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row from R: Σnₖμₖ/Σnₖ, the pooled unbiased variance Σnₖσₖ²/Σ(nₖ−1), and Σ(nₖ−1).

    A single row gives its mean and σ²·n/(n−1): torch's convention for the buffers.
    """
    n = count.unsqueeze(1)
    freedom = (count - 1).clamp(min=0).sum()
    mean = (n * mean).sum(0) / count.sum().clamp(min=1)
    return mean, (n * var).sum(0) / freedom.clamp(min=1), freedom


def all_finite(mean: Tensor, var: Tensor, buffer: Tensor | None) -> Tensor:
    """Whether every pooled moment is finite, and still is in the dtype of the buffer that is to hold it."""
    if buffer is not None:
        mean, var = mean.to(buffer.dtype), var.to(buffer.dtype)
    return mean.isfinite().all() & var.isfinite().all()


def moved(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The buffers after this batch, as new tensors.

    A batch of which no variance can be told (empty, or one value a slice) counts and moves nothing; one whose
    statistics are not finite, or overflow the buffers' dtype, likewise where `skip_nonfinite`.
    """
    new_mean, new_var, freedom = pooled(mean, var, count)
    keep = freedom == 0
    if skip_nonfinite:
        keep = keep | ~all_finite(new_mean, new_var, running_mean)
    tracked = None if num_batches_tracked is None else num_batches_tracked + 1
    if momentum is None:
        if tracked is None:
            raise ValueError("momentum=None averages all batches and needs num_batches_tracked")
        factor: Tensor | float = 1.0 / tracked.double()
    else:
        factor = momentum
    news: list[Tensor | None] = []
    for buffer, new in ((running_mean, new_mean), (running_var, new_var)):
        old = None if buffer is None else buffer.double()
        news.append(
            None
            if buffer is None or old is None
            else torch.where(keep, old, old + factor * (new - old)).to(buffer.dtype)
        )
    return news[0], news[1], tracked


def update_running_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    buffers = (running_mean, running_var, num_batches_tracked)
    news = moved(*buffers, mean, var, count, momentum, skip_nonfinite)
    for buffer, new in zip(buffers, news, strict=True):
        if buffer is not None and new is not None:
            buffer.copy_(new)


def forward_update_running_(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
    *form: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`forward`, and the buffers moved by what it found: a layer's training call, of which small ones pay for two."""
    out, mean, var, count = torch.ops.batchnorm.forward.default(input, weight, bias, residual, mask, *form)
    torch.ops.batchnorm.update_running_.default(
        running_mean, running_var, num_batches_tracked, mean, var, count, momentum, skip_nonfinite
    )
    return out, mean, var, count


def forward_inplace_(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
    *form: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward_update_running_` whose output takes the input's place."""
    out, mean, var, count = torch.ops.batchnorm.forward_update_running_.default(
        input, weight, bias, None, None, running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite, *form
    )
    input.copy_(out)
    return mean, var, count


def backward_inplace(
    grad_output: Tensor,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    slice_size: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` with the input told from the output: x = ((φ⁻¹(y) − β)/γ)·√(σ² + ε) + μ."""
    form = (eps, activation, negative_slope, slice_size)
    input = reference.restored(out, mean, var, weight, bias, *form)
    grads = backward(
        grad_output.double(), input, mean, var, count, weight, bias, None, None, *form, [*output_mask, False]
    )
    return grads[0].to(out.dtype), grads[1], grads[2]


def update_running_once_(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
    refusal: str,
) -> None:
    """`update_running_`, unless this runs inside a backward: a compiled forward that checkpointing runs again.

    Raises:
        RuntimeError: `refusal`, where it is not empty and this is such a second run.
    """
    if torch._C._current_graph_task_id() == -1:
        torch.ops.batchnorm.update_running_.default(
            running_mean, running_var, num_batches_tracked, mean, var, count, momentum, skip_nonfinite
        )
    elif refusal:
        raise RuntimeError(refusal)
