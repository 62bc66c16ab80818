"""The definition of the fused operators: compositions of the four primitives, and the update of the buffers."""

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
    """Compute `stats`, then `apply`. Returns the output, mean, var and count."""
    if input.device.type == "cpu" and not extension.LOADED:
        extension.say_slower()
    mean, var, count = reference.stats(input, mask, slice_size)
    out = reference.apply(input, mean, var, weight, bias, residual, eps, activation, negative_slope, slice_size)
    return out, mean, var, count


def grad_affine_vectors(sum_dy: Tensor, sum_dy_xmu: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the gradients of weight, Σ dz·x̂, and of bias, Σ dz, from the (R, C) sums. Both are (C,) float64."""
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
    """Compute `backward_reduce`, then `backward_elemt`, as far as `output_mask` asks.

    Args:
        count: values of each slice; None where the moments do not depend on x (running statistics).
        output_mask: which gradients are wanted, of input, weight, bias and residual.

    Returns:
        The four gradients; an empty tensor for one that is not wanted.
    """
    empty = input.new_empty(0)
    grad_input, grad_weight, grad_bias, grad_residual = empty, empty, empty, empty
    sum_dy = sum_dy_xmu = None
    if output_mask[1] or output_mask[2] or (output_mask[0] and count is not None):
        sum_dy, sum_dy_xmu = reference.backward_reduce(
            grad_output, input, mean, var, weight, bias, residual, mask, eps, activation, negative_slope, slice_size
        )
        weight_sum, bias_sum = grad_affine_vectors(sum_dy, sum_dy_xmu, var, eps)
        if output_mask[1] and weight is not None:
            grad_weight = weight_sum.to(weight.dtype)
        if output_mask[2] and bias is not None:
            grad_bias = bias_sum.to(bias.dtype)
    if output_mask[0] or output_mask[3]:
        count = count if sum_dy is not None else None  # `backward_elemt` needs the sums wherever it gets a count
        grad_input, grad_residual = reference.backward_elemt(
            grad_output, input, mean, var, weight, bias, residual, mask, sum_dy, sum_dy_xmu, count,
            eps, activation, negative_slope, slice_size, output_mask[3],
        )  # fmt: skip
    return grad_input if output_mask[0] else empty, grad_weight, grad_bias, grad_residual


def pooled(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the moments that update the running statistics, from the (R, C) moments of R slices.

    mean = Σnₖμₖ/Σnₖ and the pooled unbiased variance Σnₖσₖ²/Σ(nₖ−1). One slice gives its mean and σ²·n/(n−1), which is
    torch's convention.

    Returns:
        mean (C,), unbiased variance (C,), and the degrees of freedom Σ(nₖ−1), a scalar.
    """
    n = count.unsqueeze(1)
    freedom = (count - 1).clamp(min=0).sum()
    mean = (n * mean).sum(0) / count.sum().clamp(min=1)
    return mean, (n * var).sum(0) / freedom.clamp(min=1), freedom


def all_finite(mean: Tensor, var: Tensor, buffer: Tensor | None) -> Tensor:
    """Return whether the moments are finite, also after the conversion to the dtype of the buffer. A bool scalar."""
    if buffer is not None:
        mean, var = mean.to(buffer.dtype), var.to(buffer.dtype)
    return mean.isfinite().all() & var.isfinite().all()


def updated_buffers(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the buffers after this batch as new tensors: (1 − momentum)·old + momentum·new.

    This form keeps a new value at momentum 1 that is far below the old one; old + momentum·(new − old) rounds it away.
    A batch without a variance (empty, or one value per slice) is counted, and leaves the running statistics as they
    are. With `skip_nonfinite` the same holds for a batch whose moments are not finite in the buffers' dtype.

    Args:
        mean, var, count: (R, C), (R, C), (R,): the moments of the batch's R slices.
        momentum: None averages all batches: 1 / num_batches_tracked.

    Raises:
        ValueError: momentum is None and there is no num_batches_tracked.
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

    def updated(buffer: Tensor | None, new: Tensor) -> Tensor | None:
        if buffer is None:
            return None
        old = buffer.double()
        return torch.where(keep, old, (1 - factor) * old + factor * new).to(buffer.dtype)

    return updated(running_mean, new_mean), updated(running_var, new_var), tracked


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
    """Write `updated_buffers` to the buffers."""
    buffers = (running_mean, running_var, num_batches_tracked)
    updated = updated_buffers(*buffers, mean, var, count, momentum, skip_nonfinite)
    for buffer, new in zip(buffers, updated, strict=True):
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
    """Compute `forward`, and update the buffers by its moments: the training call of a layer.

    It is one operator because the cost of a small tensor's call is the cost of calling operators.
    """
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
    """Compute `forward_update_running_`, and write the output to the input. Returns mean, var and count."""
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
    """Compute `backward` with the input that `reference.recompute_input` gets from the output."""
    form = (eps, activation, negative_slope, slice_size)
    input = reference.recompute_input(out, mean, var, weight, bias, *form)
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
    """Compute `update_running_`, except inside a backward.

    A compiled forward inside a backward is a recomputation by activation checkpointing, whose batch was counted before.

    Raises:
        RuntimeError: with the text `refusal` inside a backward, where the text is not empty.
    """
    if torch._C._current_graph_task_id() == -1:
        torch.ops.batchnorm.update_running_.default(
            running_mean, running_var, num_batches_tracked, mean, var, count, momentum, skip_nonfinite
        )
    elif refusal:
        raise RuntimeError(refusal)
