"""`batch_norm`, one function with every keyword; a superset of `torch.nn.functional.batch_norm`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import validation
from .execution import Call, channels_second, normalize, run
from .moments import lengths_to_mask
from .ops import Form, fused
from .options import CALL_OPTIONS, DEFAULTS, Options, make_options, shows_options

__all__ = ["Buffers", "batch_norm", "batch_norm_pure", "lengths_to_mask"]


@shows_options(*CALL_OPTIONS)
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
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
    inplace: bool = False,
    **options: Any,
) -> Tensor:
    r"""Normalize each channel over the batch, then scale, shift, add a residual and activate, in one operator.

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
            are still normalized, and may hold NaN.
        ghost_batch_size: normalize slices of this many samples by their own statistics; the last may be shorter.
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
        TypeError: the input is no tensor.
        NotImplementedError: an input that is not floating point, or sparse or nested.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2; docs/derivation.md and
    docs/variants/.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    # an export looks at what is inside: it must see torch's own operators
    if has_torch_function(tensors) and not torch.compiler.is_exporting():
        validation.check_not_nested(input)
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight, bias, training, momentum, eps,
            activation=activation, residual=residual, mask=mask, negative_slope=negative_slope,
            num_batches_tracked=num_batches_tracked, inplace=inplace, **options,
        )  # fmt: skip
    validation.check_tensor(input)
    validation.check_activation(activation)
    chosen = make_options("batch_norm", options, allowed=CALL_OPTIONS) if options else DEFAULTS
    if chosen.feature_axis != 1:
        input, residual, mask = channels_second(chosen.feature_axis, input, residual, mask)
    form = Form(eps, activation or "", negative_slope, chosen.ghost_batch_size or 0)
    call = Call(
        input, running_mean, running_var, num_batches_tracked, weight, bias, residual, mask, training, momentum, form,
        chosen.renorm, chosen.process_group, chosen.nonfinite == "skip", inplace,
    )  # fmt: skip
    out = run(call)
    return out if chosen.feature_axis == 1 else out.movedim(1, chosen.feature_axis)


class Buffers(NamedTuple):
    """What a layer remembers: the running statistics (C,) and how many batches moved them."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


@shows_options(*CALL_OPTIONS)
def batch_norm_pure(
    input: Tensor,
    buffers: Buffers,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    negative_slope: float = 0.01,
    **options: Any,
) -> tuple[Tensor, Buffers]:
    """`batch_norm` without side effects: the new buffers are returned, the given ones stay as they are.

    For `torch.func`: under ``vmap`` each member gets buffers of its own; ``jacrev`` and ``functional_call`` see a
    function. All other keywords are those of `batch_norm`; shapes, errors and formula too.
    """
    validation.check_tensor(input)
    validation.check_activation(activation)
    chosen: Options = make_options("batch_norm_pure", options, allowed=CALL_OPTIONS)
    axis = chosen.feature_axis
    if axis != 1:
        input, residual, mask = channels_second(axis, input, residual, mask)
    form = Form(eps, activation or "", negative_slope, chosen.ghost_batch_size or 0)
    call = Call(
        input, *buffers, weight, bias, residual, mask, training, momentum, form, chosen.renorm, chosen.process_group
    )
    out, moments = normalize(call)
    out = out if axis == 1 else out.movedim(1, axis)
    if moments is None:
        return out, buffers
    updated = fused.updated_buffers(*buffers, *moments, momentum, chosen.nonfinite == "skip")
    return out, Buffers(*cast(tuple[Tensor, Tensor, Tensor], updated))
