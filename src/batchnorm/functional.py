"""Floor 3: `batch_norm`, one function with every keyword; a superset of `torch.nn.functional.batch_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .checks import check_activation, check_buffers, check_input, check_residual, check_vectors
from .ops import BatchStatistics, FixedStatistics, activate

__all__ = ["batch_norm"]

_apply = torch.ops.batchnorm.apply.default
_update_running_ = torch.ops.batchnorm.update_running_.default
_functorch_level = torch._C._functorch.maybe_current_level


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
    renorm: Any = None,
    process_group: Any = None,
    nonfinite: str = "propagate",
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    r"""Normalise each channel over the batch, then scale, shift, add a residual and activate, in one operator.

    .. math:: y = \mathrm{activation}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta + r\right)

    In training μ and σ² (biased) are those of the batch, over every axis but the channel's (axis 1), and the buffers
    move by ``running ← (1 − momentum)·running + momentum·batch``, with the *unbiased* variance, in place. Otherwise
    they are ``running_mean`` and ``running_var``.

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
        negative_slope: of "leaky_relu".
        num_batches_tracked: counter, incremented in training where the buffers are given.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: one value a channel in training; an eps, activation or residual that cannot be; one buffer
            without the other.
        RuntimeError: a vector of the wrong size, dtype or device; evaluation without buffers.
        NotImplementedError: an input that is not floating point.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2; docs/derivation.md.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight, bias, training, momentum, eps,
            activation=activation, residual=residual, mask=mask, ghost_batch_size=ghost_batch_size, renorm=renorm,
            process_group=process_group, nonfinite=nonfinite, negative_slope=negative_slope,
            num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    _refuse_later(mask=mask, ghost_batch_size=ghost_batch_size, renorm=renorm, process_group=process_group)
    if nonfinite != "propagate":
        _refuse_later(nonfinite=nonfinite)
    check_residual(input, residual)
    check_activation(activation)
    if momentum is None and training and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum=None averages over num_batches_tracked: give that counter, or a momentum")
    if _needs_torch():
        return _through_torch(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            activation or "", residual, negative_slope, num_batches_tracked,
        )  # fmt: skip
    if input.dim() == 1 and not input.numel():  # torch has this for an empty vector: no channel, nothing to do
        return input.clone()
    check_input(input, training, eps)
    check_buffers(running_mean, running_var, training)
    check_vectors(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    form = (eps, activation or "", negative_slope)
    if not training:
        return _with_fixed(input, weight, bias, residual, running_mean, running_var, *form)
    out, mean, var, count = BatchStatistics.apply(input, weight, bias, residual, None, *form, 0)
    if running_mean is not None:
        _update_running_(running_mean, running_var, num_batches_tracked, mean, var, count, momentum, False)
    return out


def _refuse_later(**keywords: object) -> None:
    for name, value in keywords.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not there yet: it arrives with the variants")


def _with_fixed(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias, residual)):
        return FixedStatistics.apply(input, weight, bias, residual, mean, var, eps, activation, negative_slope)
    return _apply(input, mean, var, weight, bias, residual, eps, activation, negative_slope, 0)


def _needs_torch() -> bool:
    """Whether the call must be made of torch's own operators.

    vmap, jacrev and forward mode have rules for these; an exported or traced program runs where we are not installed.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _functorch_level() is not None or forward_ad._current_level >= 0 or torch._C._is_tracing()


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
    factor = momentum
    if training and running_mean is not None and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor or 0.0, eps)
    return activate(out if residual is None else out + residual, activation, negative_slope)
