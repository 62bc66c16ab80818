"""Normalization with moments that change between `stats` and `apply`: synchronized, renormalized, or both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import Form, fused, reference
from ..ops.autograd import differentiable_gradients
from .renorm import Reference, corrections, renormalize, renormalize_adjoint
from .synchronized import Group, share_slices, synchronize, synchronize_adjoint

_stats = torch.ops.batchnorm.stats.default
_apply = torch.ops.batchnorm.apply.default
_backward_reduce = torch.ops.batchnorm.backward_reduce.default
_backward_elemt = torch.ops.batchnorm.backward_elemt.default

Moments = tuple[Tensor, Tensor, Tensor]


class _Sourced(torch.autograd.Function):
    """Compute `apply` with moments that depend on the batch.

    The gradient through the moments uses the adjoint of their source.
    """

    @staticmethod
    def output_again(saved: tuple[Tensor | None, ...], form: Form) -> Tensor:
        """Compute the output again; see `ops.autograd`."""
        input, mean, var, _, weight, bias, *_ = saved
        out: Tensor = _apply(input, mean, var, weight, bias, None, *form)
        return out

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        r: Tensor | None,
        d: Tensor | None,
        group: Group | None,
        eps: float,
        activation: str,
        negative_slope: float,
        slice_size: int,
    ) -> Tensor:
        form = Form(eps, activation, negative_slope, slice_size)
        ctx.save_for_backward(input, mean, var, count, weight, bias, residual if activation else None, mask, r, d)
        ctx.form, ctx.group = form, group
        return _apply(input, mean, var, weight, bias, residual, *form)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, count, weight, bias, residual, mask, r, d = ctx.saved_tensors
        form = ctx.form
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _second_order(ctx, grad_output)
        arguments = (grad_output, input, mean, var, weight, bias, residual, mask)
        sum_dy, sum_dy_xmu = _backward_reduce(*arguments, *form)
        grad_weight, grad_bias = fused.grad_affine_vectors(sum_dy, sum_dy_xmu, var, form.eps)
        if (
            ctx.group is not None
        ):  # on every rank, also one that needs no gradient: all ranks must make the same collectives
            sum_dy, sum_dy_xmu = synchronize_adjoint(sum_dy, sum_dy_xmu, ctx.group)
        if r is not None:
            sum_dy, sum_dy_xmu = renormalize_adjoint(sum_dy, sum_dy_xmu, var, r, d, form.eps)
        through_activation = needs[3] and bool(form.activation)
        grad_input = grad_residual = None
        if needs[0] or through_activation:
            grad_input, grad_residual = _backward_elemt(
                *arguments, sum_dy, sum_dy_xmu, count, *form, through_activation
            )
        if needs[3] and not through_activation:
            grad_residual = grad_output
        return (
            grad_input if needs[0] else None,
            grad_weight.to(weight.dtype) if needs[1] else None,
            grad_bias.to(bias.dtype) if needs[2] else None,
            grad_residual if needs[3] else None,
            *(None,) * 11,
        )


def _second_order(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Compute gradients that can be differentiated again. r and d are constants, as in the first derivative."""
    input, _, _, _, weight, bias, residual, mask, r, d = ctx.saved_tensors
    if ctx.group is not None:
        raise NotImplementedError("second derivatives through synchronized statistics: use process_group=None for them")
    mean, var, _ = reference.stats(input, mask, ctx.form.slice_size)
    if r is not None:
        mean, var = renormalize(mean, var, r, d, ctx.form.eps)
    tensors, needs = (input, weight, bias, residual), ctx.needs_input_grad[:4]
    grads = differentiable_gradients(grad_output, tensors, mask, (mean, var), ctx.form, needs)
    return (*grads, *(None,) * 11)


def differentiable_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    group: Group | None,
    against: Reference | None,
) -> tuple[Tensor, Moments]:
    """Compute `sourced_batch_norm` in differentiable aten operators only, for vmap, forward mode and export.

    Raises:
        NotImplementedError: with a group, because a collective has no rule under these transforms.
    """
    if group is not None:
        raise NotImplementedError("synchronized statistics under vmap, forward mode or export: use process_group=None")
    eps, slice_size = form.eps, form.slice_size
    mean, var, count = reference.stats(input, mask, slice_size)
    moments = (mean.detach(), var.detach(), count)
    if against is not None:
        r, d = corrections(mean, var, against, eps)
        mean, var = renormalize(mean, var, r, d, eps)
    return reference.apply_around_padding(input, mask, mean, var, weight, bias, residual, *form), moments


def sourced_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    form: Form,
    group: Group | None,
    against: Reference | None,
) -> tuple[Tensor, Moments]:
    """Compute the output, and the moments that update the buffers.

    These moments are the ones before renormalization, of the batches of all ranks together. A ghost slice
    (`slice_size` > 0) belongs to one rank, which normalizes it with its own moments; only the update of the buffers is
    shared with the group.
    """
    eps, slice_size = form.eps, form.slice_size
    mean, var, count = moments = _stats(input.detach(), mask, slice_size)
    if group is not None and slice_size:
        moments = share_slices(mean, var, count, group)
    elif group is not None:
        mean, var, count = moments = synchronize(mean, var, count, group)
    r = d = None
    if against is not None:
        r, d = corrections(mean, var, against, eps)
        mean, var = renormalize(mean, var, r, d, eps)
    adjoint_group = None if slice_size else group
    out = _Sourced.apply(input, weight, bias, residual, mask, mean, var, count, r, d, adjoint_group, *form)
    return out, moments
