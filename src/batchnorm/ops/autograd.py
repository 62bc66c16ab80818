"""Reverse-mode derivatives of the operators. docs/derivation.md derives them.

The forward saves the input, the moments and the vectors of weight and bias. The backward recomputes z, the argument of
the activation, from them. So batch normalization with an activation saves no more memory than without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import extension, reference
from .form import Form
from .layout import dense

# The names are looked up once, because each look-up would cost as much as a small kernel.
_forward = torch.ops.batchnorm.forward.default
_forward_update_running_ = torch.ops.batchnorm.forward_update_running_.default
_apply = torch.ops.batchnorm.apply.default
_backward = torch.ops.batchnorm.backward.default
_forward_inplace_ = torch.ops.batchnorm.forward_inplace_.default
_backward_inplace = torch.ops.batchnorm.backward_inplace.default
# Returns the hooks (pack, unpack) on tensors that are saved for a backward, or None.
_saved_tensors_hooks: Callable[[bool], object] = torch._C._autograd._top_saved_tensors_default_hooks


def differentiable_gradients(
    grad_output: Tensor,
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    mask: Tensor | None,
    moments: tuple[Tensor, Tensor],
    form: Form,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Compute gradients that can be differentiated again (`create_graph=True`).

    Autograd derives them from the reference, which consists of differentiable aten operators.

    Args:
        tensors: input, weight, bias and residual.
        moments: mean and var, as differentiable functions of the input where they depend on it.
        needs: which gradients of `tensors` are needed.
    """
    input, *affine = tensors
    out = reference.apply_around_padding(input, mask, *moments, *affine, *form)
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(out, wanted, grad_output, create_graph=True) if wanted else ())
    found = [next(grads) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)]
    if needs[3] and found[3] is None:  # without an activation the residual is not saved: its gradient is grad_output
        found[3] = grad_output
    return found


def gradients(
    grad_output: Tensor,
    saved: tuple[Tensor | None, ...],
    form: Form,
    needs: list[bool],
) -> list[Tensor | None]:
    """Compute the gradients of input, weight, bias and residual, as far as they are needed.

    csrc/autograd calls this function too, for gradients that are differentiated again.

    Args:
        saved: input, mean, var, count, weight, bias, residual and mask. `count` is None for fixed statistics.
    """
    form = Form(*form)  # csrc/autograd passes a plain tuple
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        input, mean, var, count, weight, bias, residual, mask = saved
        assert input is not None
        assert mean is not None
        assert var is not None
        if count is not None:
            mean, var, _ = reference.stats(input, mask, form.slice_size)
        tensors = (input, weight, bias, residual)
        return differentiable_gradients(grad_output, tensors, mask, (mean, var), form, needs)
    through_activation = needs[3] and form.activation != ""
    found = _backward(grad_output, *saved, *form, [*needs[:3], through_activation])
    grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    if needs[3] and not through_activation:
        grads[3] = grad_output
    return grads


class _Function(torch.autograd.Function):
    """The backward that the functions below share."""

    @staticmethod
    def output_again(saved: Sequence[Tensor | None], form: Form) -> Tensor:
        """Compute the output again, bit for bit, from the tensors that `backward` reads. There was no residual."""
        input, mean, var, _, weight, bias, *_ = saved
        out: Tensor = _apply(input, mean, var, weight, bias, None, *form)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * ctx.inputs
        grads = gradients(grad_output, ctx.saved_tensors, ctx.form, list(ctx.needs_input_grad[:4]))
        return (*grads, *(None,) * (ctx.inputs - 4))


class _BatchStatisticsFunction(_Function):
    @staticmethod
    def output_again(saved: Sequence[Tensor | None], form: Form) -> Tensor:
        input, _, _, _, weight, bias, _, mask = saved
        assert input is not None
        if input.device.type == "cpu":  # whose kernels apply in `forward` and `apply` by the same loops
            return _Function.output_again(saved, form)
        out: Tensor = _forward(input, weight, bias, None, mask, *form)[0]
        return out


class BatchStatistics(_BatchStatisticsFunction):
    """Compute `forward`. Returns the output, mean, var and count.

    The moments are not differentiable outputs: the gradient of the output contains the gradient through them.
    """

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


class TrainingCall(_BatchStatisticsFunction):
    """Compute `forward_update_running_`. Returns the output.

    `buffers` are (running_mean, running_var, num_batches_tracked). Autograd does not look into a tuple, so they are not
    its inputs, which makes the call of a small tensor cheaper. Only eager calls may use this function, because a
    compiler has to know which tensors are written.
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
    """Compute `TrainingCall`, and write the output to the input. The backward recomputes the input from the output.

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


# Limits of |bias/weight|: the rounding error of x̂ = (z − bias)/weight grows in proportion to it (docs/in-place.md).
_MAX_RATIO, _MAX_RATIO_16_BIT = 128.0, 4.0


def may_overwrite(input: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> bool:
    """Return whether the output may be written to the input.

    No other code may use the input, and the backward must be able to recompute it from the output. A leaf (a batch of
    data) is never overwritten. Nor is any input under hooks on saved tensors, because activation checkpointing would
    use the output as the input when it recomputes.
    """
    needed = extension.LOADED and torch.is_grad_enabled() and input.requires_grad and input.device.type == "cpu"
    if not needed or input.is_leaf or input._is_view() or dense(input) is not input or _saved_tensors_hooks(False):
        return False
    if form.activation != "" and not (form.activation == "leaky_relu" and form.negative_slope > 0):
        return False
    if weight is None and bias is None:
        return True
    limit = _MAX_RATIO_16_BIT if input.dtype.itemsize == 2 else _MAX_RATIO
    scale = torch.ones(()) if weight is None else weight.detach().abs()
    shift = torch.zeros(()) if bias is None else bias.detach().abs()
    return bool((shift < limit * scale).all())


class FixedStatistics(_Function):
    """Compute `apply` with fixed moments (running statistics). They get no gradient."""

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
        # copies, because another forward or DDP's broadcast may write the buffers before the backward reads them
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
    """Call `TrainingCall` with the arguments of `training_call`."""
    buffers = (running_mean, running_var, num_batches_tracked)
    return TrainingCall.apply(input, weight, bias, residual, mask, buffers, momentum, skip_nonfinite, Form(*form))


_compiled = extension.autograd_module(torch.__version__)

# The arguments of `TrainingCall` as one flat list; implemented in C++ where csrc/autograd was built.
training_call: Callable[..., Tensor] = python_training_call if _compiled is None else _compiled.training_call
# The same for (input, weight, bias, residual, running_mean, running_var, num_batches_tracked, momentum, *form). It
# returns None for arguments that validation.py might refuse, and where the call is traced, transformed or recomputed.
plain_training_call: Callable[..., Tensor | None] = (
    (lambda *_: None) if _compiled is None else _compiled.plain_training_call
)
# `apply` or `FixedStatistics` under the same condition, for (input, weight, bias, residual, running_mean, running_var,
# eps, activation, negative_slope).
plain_running_call: Callable[..., Tensor | None] = (
    (lambda *_: None) if _compiled is None else _compiled.plain_running_call
)
