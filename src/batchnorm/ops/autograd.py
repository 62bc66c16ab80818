"""Reverse-mode derivatives of the fused operators, derived by hand in docs/derivation.md.

Nothing but the input, the moments and the small vectors is kept for the backward: what an activation's derivative
needs (its argument z) is computed again from them, so BN with an activation saves no more than BN alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import extension, reference
from .form import Form
from .layout import dense

# The dispatcher resolves a name once; per call that look-up would cost as much as a small kernel.
_forward = torch.ops.batchnorm.forward.default
_forward_update_running_ = torch.ops.batchnorm.forward_update_running_.default
_apply = torch.ops.batchnorm.apply.default
_backward = torch.ops.batchnorm.backward.default
_forward_inplace_ = torch.ops.batchnorm.forward_inplace_.default
_backward_inplace = torch.ops.batchnorm.backward_inplace.default
# the pair that packs and unpacks what is saved for a backward, or None
_saved_tensors_hooks: Callable[[bool], object] = torch._C._autograd._top_saved_tensors_default_hooks


def _second_order(
    grad_output: Tensor,
    saved: tuple[Tensor | None, ...],
    form: Form,
    needs: list[bool],
) -> list[Tensor | None]:
    """The same four gradients as functions that can be differentiated again (`create_graph=True`).

    The reference is made of differentiable aten operators, so autograd derives these from it.
    """
    input, mean, var, count, weight, bias, residual, mask = saved
    assert input is not None
    assert mean is not None
    assert var is not None
    if count is not None:
        mean, var, _ = reference.stats(input, mask, form.slice_size)
    out = reference.apply_around_padding(input, mask, mean, var, weight, bias, residual, *form)
    wanted = [t for t, need in zip((input, weight, bias, residual), needs, strict=True) if need and t is not None]
    if not wanted:  # a residual alone, which without an activation is not saved
        return [None] * 4
    grads = iter(torch.autograd.grad(out, wanted, grad_output, create_graph=True))
    return [
        next(grads) if need and t is not None else None
        for t, need in zip((input, weight, bias, residual), needs, strict=True)
    ]


def gradients(
    grad_output: Tensor,
    saved: tuple[Tensor | None, ...],
    form: Form,
    needs: list[bool],
) -> list[Tensor | None]:
    """Those of input, weight, bias and residual, where needed. `count` None means frozen statistics.

    csrc/autograd comes here too where they are to be differentiated again.
    """
    form = Form(*form)  # from C++ a plain tuple
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _second_order(grad_output, saved, form, needs)
        if needs[3] and grads[3] is None:
            grads[3] = grad_output
        return grads
    through_activation = needs[3] and form.activation != ""
    found = _backward(grad_output, *saved, *form, [*needs[:3], through_activation])
    grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    if needs[3] and not through_activation:
        grads[3] = grad_output
    return grads


class _Function(torch.autograd.Function):
    """What the three functions below share: the backward."""

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * ctx.inputs
        grads = gradients(grad_output, ctx.saved_tensors, ctx.form, list(ctx.needs_input_grad[:4]))
        return (*grads, *(None,) * (ctx.inputs - 4))


class BatchStatistics(_Function):
    """`forward` with the batch's own moments, which are returned beside the output and are not differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
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
        form = Form(eps, activation, negative_slope, slice_size)
        out, mean, var, count = _forward(input, weight, bias, residual, mask, *form)
        ctx.save_for_backward(input, mean, var, count, weight, bias, residual if activation else None, mask)
        ctx.form, ctx.inputs = form, 9
        ctx.mark_non_differentiable(mean, var, count)
        ctx.set_materialize_grads(False)
        return out, mean, var, count


class TrainingCall(_Function):
    """`BatchStatistics` that moves the buffers (running_mean, running_var, num_batches_tracked) and returns the output.

    In a tuple the buffers are no inputs to autograd, which has less to look at: a small tensor's call is all overhead.
    For eager calls only: a compiler must see what is written to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        buffers: tuple[Tensor, Tensor, Tensor | None],
        momentum: float | None,
        skip_nonfinite: bool,
        form: Form,
    ) -> Tensor:
        out, mean, var, count = _forward_update_running_(
            input, weight, bias, residual, mask, *buffers, momentum, skip_nonfinite, *form
        )
        ctx.save_for_backward(input, mean, var, count, weight, bias, residual if form.activation else None, mask)
        ctx.form, ctx.inputs = form, 9
        ctx.set_materialize_grads(False)
        return out


class InPlaceCall(torch.autograd.Function):
    """`TrainingCall` whose output takes the input's place, and is what the backward keeps instead of it.

    Source: Rota Bulò, Porzi & Kontschieder 2018, https://arxiv.org/abs/1712.02616; docs/in-place.md.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        buffers: tuple[Tensor | None, Tensor | None, Tensor | None],
        momentum: float | None,
        skip_nonfinite: bool,
        form: Form,
    ) -> Tensor:
        mean, var, count = _forward_inplace_(input, weight, bias, *buffers, momentum, skip_nonfinite, *form)
        ctx.mark_dirty(input)
        ctx.save_for_backward(input, mean, var, count, weight, bias)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return input

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 7
        if torch.is_grad_enabled():
            raise RuntimeError(
                "batch_norm: its input was written over, so its gradients cannot be differentiated again "
                "(create_graph=True): use inplace=False"
            )
        needs = list(ctx.needs_input_grad[:3])
        grads = _backward_inplace(grad_output, *ctx.saved_tensors, *ctx.form, needs)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 4)


# How far β may lie beyond γ: x̂ = (z − β)/γ carries |β/γ| roundings of z (docs/in-place.md).
_MOST, _MOST_OF_HALF = 128.0, 4.0


def may_overwrite(input: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> bool:
    """Whether an output may take this input's place: it is nobody else's, and the backward can undo what is done.

    Only where there is something to save, so never a batch of data; and never under hooks on saved tensors: activation
    checkpointing would find the output where it left an input, and take it for one.
    """
    needed = extension.LOADED and torch.is_grad_enabled() and input.requires_grad and input.device.type == "cpu"
    if not needed or input.is_leaf or input._is_view() or dense(input) is not input or _saved_tensors_hooks(False):
        return False
    if form.activation != "" and not (form.activation == "leaky_relu" and form.negative_slope > 0):
        return False
    if weight is None and bias is None:
        return True
    most = _MOST_OF_HALF if input.dtype.itemsize == 2 else _MOST
    gamma = torch.ones(()) if weight is None else weight.detach().abs()
    beta = torch.zeros(()) if bias is None else bias.detach().abs()
    return bool((beta < most * gamma).all())


class FixedStatistics(_Function):
    """`apply` with given moments (running, frozen): the gradient does not pass through them."""

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
        eps: float,
        activation: str,
        negative_slope: float,
    ) -> Tensor:
        form = Form(eps, activation, negative_slope)
        # copies: the buffers may move before the backward reads them (another forward, DDP's broadcast)
        mean, var = mean.double().clone(), var.double().clone()
        ctx.save_for_backward(input, mean, var, None, weight, bias, residual if activation else None, mask)
        ctx.form, ctx.inputs = form, 10
        ctx.set_materialize_grads(False)
        return _apply(input, mean, var, weight, bias, residual, *form)


def python_training_call(
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
) -> Tensor:
    buffers = (running_mean, running_var, num_batches_tracked)
    return TrainingCall.apply(input, weight, bias, residual, mask, buffers, momentum, skip_nonfinite, Form(*form))


_compiled = extension.autograd_module(torch.__version__)

# `TrainingCall` with all its arguments in a row, in C++ where that was built
training_call: Callable[..., Tensor] = python_training_call if _compiled is None else _compiled.training_call
# The same for (input, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, *form) that
# surely pass validation.py, where nothing traces, transforms or recomputes the call; None where that is not sure.
plain_training_call: Callable[..., Tensor | None] = (
    (lambda *_: None) if _compiled is None else _compiled.plain_training_call
)
# `apply` and `FixedStatistics` likewise: (input, weight, bias, residual, running_mean, running_var, eps, activation,
# negative_slope)
plain_running_call: Callable[..., Tensor | None] = (
    (lambda *_: None) if _compiled is None else _compiled.plain_running_call
)
