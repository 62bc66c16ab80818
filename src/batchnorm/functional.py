"""Floor 3: `batch_norm`, one function with every keyword; a superset of `torch.nn.functional.batch_norm`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import checks
from .moments import (
    Moments,
    ProcessGroupLike,
    Reference,
    Renorm,
    differentiable_batch_norm,
    flat_mask,
    lengths_to_mask,
    resolve,
    sourced_batch_norm,
)
from .ops import BatchStatistics, FixedStatistics, InPlaceCall, activate, fits, fused, may_overwrite
from .ops import training_call as _training_call

__all__ = ["Buffers", "batch_norm", "batch_norm_pure", "batch_norm_with_moments", "lengths_to_mask"]

_apply = torch.ops.batchnorm.apply.default
_update_running_ = torch.ops.batchnorm.update_running_.default
_update_running_once_ = torch.ops.batchnorm.update_running_once_.default
_functorch_level = torch._C._functorch.maybe_current_level
_graph_task = torch._C._current_graph_task_id
_is_tracing = torch._C._is_tracing


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    ghost_batch_size: int | None = None,
    renorm: Renorm | None = None,
    process_group: ProcessGroupLike = None,
    nonfinite: str = "propagate",
    feature_axis: int = 1,
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    r"""Normalise each channel over the batch, then scale, shift, add a residual and activate, in one operator.

    .. math:: y = \mathrm{activation}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta + r\right)

    In training μ and σ² (biased) are those of the batch, over every axis but the channel's, and the buffers move by
    ``running ← (1 − momentum)·running + momentum·batch``, with the *unbiased* variance, in place. Otherwise they are
    ``running_mean`` and ``running_var``. A forward that autograd runs again in a backward (activation checkpointing)
    does not move the buffers a second time.

    Args:
        input: (N, C) or (N, C, \*); float32, float64, bfloat16 or float16.
        running_mean, running_var: (C,), the input's dtype (or float32 beside a half input); None in training means
            that no statistics are kept.
        weight, bias: γ and β, (C,), dtypes as the buffers'; None means 1 and 0.
        training: take the batch's own moments.
        momentum: weight of the NEW batch in the buffers; None averages all batches alike (needs
            ``num_batches_tracked``).
        eps: ε, added to the variance.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or "tanh".
        residual: added before the activation; the input's shape and dtype.
        mask: bool, True = a real position; the input's shape without the channel axis, or with size 1 there,
            broadcastable. Masked positions take no part in the statistics and receive no gradient through them; they
            are still normalised, and may hold NaN.
        ghost_batch_size: normalise slices of this many samples by their own statistics; the last may be shorter.
            The buffers move once, by the slices' pooled mean and variance.
        renorm: batch renormalization, see `Renorm`; needs the buffers.
        process_group: "world" or a ``torch.distributed`` group: the moments of the joined batch of all its ranks,
            which may hold different numbers of samples, also none.
        nonfinite: "propagate", or "skip": a batch whose statistics are NaN or Inf leaves the buffers as they were.
        feature_axis: the channels' axis; -1 for sequences (N, L, C).
        negative_slope: of "leaky_relu".
        num_batches_tracked: counter, incremented in training where the buffers are given.
        inplace: the output may take the input's place, which the backward then needs no more: a permission, used in
            eager training on the CPU for no activation or "leaky_relu", where γ and β let the input be told from the
            output (docs/in-place.md). Such a call's gradients cannot be differentiated again.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: one value a channel in training; an eps, activation, residual, mask, slice or group that cannot
            be; one buffer without the other.
        RuntimeError: a vector of the wrong size, dtype or device; evaluation without buffers.
        NotImplementedError: an input that is not floating point.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2; docs/derivation.md and
    docs/variants/.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight, bias, training, momentum, eps,
            activation=activation, residual=residual, mask=mask, ghost_batch_size=ghost_batch_size, renorm=renorm,
            process_group=process_group, nonfinite=nonfinite, feature_axis=feature_axis,
            negative_slope=negative_slope, num_batches_tracked=num_batches_tracked, inplace=inplace,
        )  # fmt: skip
    if feature_axis != 1:
        return on_axis(
            batch_norm, feature_axis, input, residual, mask, running_mean, running_var, weight, bias, training,
            momentum, eps, activation=activation, ghost_batch_size=ghost_batch_size, renorm=renorm,
            process_group=process_group, nonfinite=nonfinite, negative_slope=negative_slope,
            num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    checks.check_words(activation, nonfinite)
    checks.check_residual(input, residual)
    checks.check_momentum(momentum, training, running_mean, num_batches_tracked)
    simple = training and running_mean is not None and renorm is None and process_group is None
    if simple and input.dim() > 1 and direct():
        return training_call(
            input, weight, bias, residual, mask, (running_mean, running_var, num_batches_tracked), momentum,
            nonfinite == "skip", (eps, activation or "", negative_slope, ghost_batch_size or 0), inplace,
        )  # fmt: skip
    plain = all(v is None for v in (mask, ghost_batch_size, renorm, process_group)) and nonfinite == "propagate"
    # with momentum=None a factor of 1/num_batches_tracked would have to be read on the host
    plain = plain and (momentum is not None or running_mean is None)
    if (plain or not training) and runs_where_we_are_not():
        return _through_torch(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            activation or "", residual, negative_slope, num_batches_tracked,
        )  # fmt: skip
    out, moments = batch_norm_with_moments(
        input, running_mean, running_var, weight, bias, training, eps,
        activation=activation, residual=residual, mask=mask, ghost_batch_size=ghost_batch_size, renorm=renorm,
        process_group=process_group, negative_slope=negative_slope, num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
    if moments is not None and running_mean is not None and not recomputing():
        move_buffers(running_mean, running_var, num_batches_tracked, *moments, momentum, nonfinite == "skip")
    return out


def training_call(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    buffers: tuple[Tensor | None, Tensor | None, Tensor | None],
    momentum: float | None,
    skip_nonfinite: bool,
    form: tuple[float, str, float, int],
    inplace: bool = False,
) -> Tensor:
    """A layer's eager training call, in one operator: what a small tensor's time goes into is all the rest."""
    running_mean, running_var, _ = buffers
    if not fits(input, running_mean, running_var, weight, bias, form[0], form[3]):
        checks.check_input(input, True, form[0], form[3] or None, synchronised=False)
        checks.check_buffers(running_mean, running_var, True)
        checks.check_vectors(input, running_mean, running_var, weight, bias)
    if inplace and residual is None and mask is None and may_overwrite(input, weight, bias, form):
        return InPlaceCall.apply(input, weight, bias, buffers, momentum, skip_nonfinite, form)
    real = None if mask is None else flat_mask(mask, input)
    return _training_call(input, weight, bias, residual, real, buffers, momentum, skip_nonfinite, form)


def batch_norm_with_moments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    ghost_batch_size: int | None = None,
    renorm: Renorm | None = None,
    process_group: ProcessGroupLike = None,
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """`batch_norm` that moves no buffer: the output, and in training the (mean, var, count) that would move them.

    For callers that keep the statistics in another way than one update a call (accumulation, domains, pure form).
    """
    if input.dim() == 1 and not input.numel():  # torch has this for an empty vector: no channel, nothing to do
        return input.clone(), None
    group = resolve(process_group) if training else None
    checks.check_input(input, training, eps, ghost_batch_size, synchronised=group is not None)
    checks.check_buffers(running_mean, running_var, training)
    checks.check_vectors(input, running_mean, running_var, weight, bias)
    real = None if mask is None else flat_mask(mask, input)
    affine = (weight, bias, residual)
    if not training:
        assert running_mean is not None  # check_buffers
        assert running_var is not None
        return _with_fixed(input, *affine, real, running_mean, running_var, eps, activation, negative_slope), None
    form = (eps, activation or "", negative_slope, ghost_batch_size or 0)
    against = None
    if renorm is not None:
        if running_mean is None or running_var is None:
            raise ValueError("renorm corrects towards the running statistics: give running_mean and running_var")
        against = Reference(running_mean, running_var, renorm.bounds(num_batches_tracked))
    if runs_where_we_are_not():
        return differentiable_batch_norm(input, *affine, real, form, group, against)
    if group is None and against is None:
        out, *moments = BatchStatistics.apply(input, *affine, real, *form)
        return out, tuple(moments)
    return sourced_batch_norm(input, *affine, real, form, group, against)


class Buffers(NamedTuple):
    """What a layer remembers: the running statistics (C,) and how many batches moved them."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


def batch_norm_pure(
    input: Tensor,
    buffers: Buffers,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    nonfinite: str = "propagate",
    **keywords: Any,
) -> tuple[Tensor, Buffers]:
    """`batch_norm` without side effects: the new buffers are returned, the given ones stay as they are.

    For `torch.func`: under ``vmap`` each member gets buffers of its own; ``jacrev`` and ``functional_call`` see a
    function. All other keywords are those of `batch_norm`; shapes, errors and formula too.
    """
    checks.check_words(keywords.get("activation"), nonfinite)
    checks.check_residual(input, keywords.get("residual"))
    axis = keywords.pop("feature_axis", 1)
    if axis != 1:
        input = input.movedim(axis, 1)
        keywords["residual"], keywords["mask"] = _moved(keywords.get("residual"), keywords.get("mask"), axis, input)
    mean, var, tracked = buffers
    out, moments = batch_norm_with_moments(
        input, mean, var, weight, bias, training, eps, num_batches_tracked=tracked, **keywords
    )
    out = out if axis == 1 else out.movedim(1, axis)
    if moments is None:
        return out, buffers
    moved = fused.moved(mean, var, tracked, *moments, momentum, nonfinite == "skip")
    return out, Buffers(*cast(tuple[Tensor, Tensor, Tensor], moved))


def move_buffers(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | None,
    skip_nonfinite: bool,
    refusal: str = "",
) -> None:
    """The buffers' update, in place, by the operator or by what it is made of.

    A compiled call cannot know whether it is a recomputation; the operator it runs can, and does nothing then, or
    raises `refusal`.
    """
    arguments = (running_mean, running_var, num_batches_tracked, mean, var, count, momentum, skip_nonfinite)
    if runs_where_we_are_not():
        fused.update_running_(*arguments)
    elif torch.compiler.is_compiling():
        _update_running_once_(*arguments, refusal)
    else:
        _update_running_(*arguments)


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing's second look at a batch already counted.

    Source: https://github.com/pytorch/pytorch/issues/96136.
    """
    return not torch.compiler.is_compiling() and _graph_task() != -1


def on_axis(
    function: Any,
    axis: int,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    *arguments: Any,
    **keywords: Any,
) -> Tensor:
    """The function with the channels at axis 1: a view, which the kernels read as channels_last without a copy."""
    if not -input.dim() <= axis < input.dim() or axis in (0, -input.dim()):
        raise ValueError(f"feature_axis {axis} is no channel axis of an input of shape {tuple(input.shape)}")
    moved = input.movedim(axis, 1)
    residual, mask = _moved(residual, mask, axis, moved)
    return function(moved, *arguments, residual=residual, mask=mask, **keywords).movedim(1, axis)


def _moved(
    residual: Tensor | None, mask: Tensor | None, axis: int, input: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if residual is not None:
        residual = residual.movedim(axis, 1)
    if mask is not None and mask.dim() == input.dim():
        mask = mask.movedim(axis, 1)
    return residual, mask


def _with_fixed(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    form = (eps, activation or "", negative_slope)
    if runs_where_we_are_not():
        return _through_torch(input, mean, var, weight, bias, False, 0.0, *form[:2], residual, negative_slope, None)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias, residual)):
        return FixedStatistics.apply(input, weight, bias, residual, mask, mean, var, *form)
    return _apply(input, mean, var, weight, bias, residual, *form, 0)


def runs_where_we_are_not() -> bool:
    """Whether the call must be made of torch's own operators.

    vmap, jacrev and forward mode have rules for these; an exported or traced program runs where we are not installed.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _functorch_level() is not None or forward_ad._current_level >= 0 or _is_tracing()


def direct() -> bool:
    """Whether the call runs here and now and once: nothing compiles, exports, traces, transforms or recomputes it."""
    return not torch.compiler.is_compiling() and not runs_where_we_are_not() and _graph_task() == -1


def _through_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    negative_slope: float,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """The plain layer in torch's operators, which every tool knows."""
    if training and running_mean is not None and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
    return activate(out if residual is None else out + residual, activation, negative_slope)
