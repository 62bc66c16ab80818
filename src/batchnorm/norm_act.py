"""BatchNormAct1d, BatchNormAct2d and BatchNormAct3d: a normalization, a residual and an activation as one module."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from . import validation
from .layer_call import run_layer
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormBase, refuse_scripting
from .options import NAMES, make_options, shows_options
from .pairs import known_activation, make_activation

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d", "BatchNormActBase"]

_PROXY: Any = fx.Proxy


class BatchNormActBase(nn.Module):
    """The composite: two visible children, and one operator for both while nobody looks between them."""

    norm_type: ClassVar[type[BatchNormBase]]
    norm: BatchNormBase
    act: nn.Module

    @shows_options(*NAMES)
    def __init__(
        self,
        num_features: int,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        negative_slope: float = 0.01,
        inplace: bool = False,
        save_memory: bool = False,
        **options: Any,
    ) -> None:
        validation.check_activation(activation)
        make_options(type(self).__name__, options)  # refused by this class's name
        super().__init__()
        self.norm = self.norm_type(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, **options
        )
        self.norm.save_memory = save_memory
        self.act = make_activation(activation, negative_slope)
        self.inplace = inplace

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        domain: int | Tensor | None = None,
    ) -> Tensor:
        """``act(norm(input) + residual)``; see the class.

        Args:
            input: of the class's shape.
            residual: the input's shape and dtype.
            mask: bool, True = a real position; without C, or with 1 there, broadcastable to the input's shape.
            domain: of a layer with ``domains``: an int for the batch, or one a sample (N,).
        """
        norm: Any = self._modules["norm"]
        act = self._modules["act"]
        word = known_activation(act, norm) if getattr(type(norm), "forward", None) is BatchNormBase.forward else None
        # a tracer and an exported program are to see the two modules; the flag is `torch.compiler.is_exporting()`'s
        if word is None or isinstance(input, _PROXY) or torch.compiler._is_exporting_flag:
            return self._one_after_the_other(input, residual, mask, domain)
        inplace = self.inplace and not self._forward_hooks  # a hook after the call is to find the input
        return run_layer(norm, input, residual, mask, domain, word[0], word[1], inplace)

    def _one_after_the_other(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: int | Tensor | None
    ) -> Tensor:
        if not isinstance(input, _PROXY):
            validation.check_residual(input, residual)
        given = {name: value for name, value in (("mask", mask), ("domain", domain)) if value is not None}
        out = self.norm(input, **given)  # what stands there may take the input alone
        return self.act(out if residual is None else out + residual)

    def __prepare_scriptable__(self) -> Any:
        refuse_scripting(self)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class BatchNormAct1d(BatchNormActBase):
    r"""Normalize each channel of (N, C) or (N, C, L) over the batch, add a residual and activate, in one operator.

    .. math:: y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma +
        \beta + \mathrm{residual}\right)

    A module with two children: ``norm``, a `BatchNorm1d`, and ``act``, the activation's own module. One operator
    computes both, and keeps for the backward what the normalization alone would keep. While a hook looks at a child, or
    a child is wrapped, parametrized, compiled or replaced by something else, the children are called one after the
    other, with the same values: whatever a tool does to a child is respected.

    Shape and dtype:
        input, residual and output: (N, C) or (N, C, L), as `BatchNorm1d`. ``layer(input, residual, mask, domain)``.

    Args:
        num_features: C, the number of channels.
        activation: "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", or None for the identity.
        eps, momentum, affine, track_running_stats, device, dtype, bias: of ``norm``, see `BatchNorm1d`.
        negative_slope: of "leaky_relu".
        inplace: the output may take the input's place in eager training on the CPU, for "leaky_relu" and None, where γ
            and β let the input be told from the output (docs/in-place.md). Only for an input that nobody else reads.
        save_memory: the next operators keep no output for their backward: it is computed again from the input, bit for
            bit (docs/memory.md). Not with a residual. It takes the place of `inplace`.
        ghost_batch_size, renorm, process_group, nonfinite, feature_axis, accumulation_steps, domains, domain_affine:
            of ``norm``, see `BatchNorm1d`.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: at construction, an unknown activation, a keyword that cannot be, or two that cannot be together; in
            the call, a residual of another shape, and all that `BatchNorm1d` refuses.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; the addition before the activation: He et al. 2016,
    https://arxiv.org/abs/1512.03385.
    """

    norm_type = BatchNorm1d


class BatchNormAct2d(BatchNormActBase):
    r"""Normalize each channel of (N, C, H, W) over the batch, add a residual and activate, in one operator.

    .. math:: y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma +
        \beta + \mathrm{residual}\right)

    A module with two children: ``norm``, a `BatchNorm2d`, and ``act``, the activation's own module. One operator
    computes both, and keeps for the backward what the normalization alone would keep. While a hook looks at a child, or
    a child is wrapped, parametrized, compiled or replaced by something else, the children are called one after the
    other, with the same values: whatever a tool does to a child is respected.

    Shape and dtype:
        input, residual and output: (N, C, H, W), as `BatchNorm2d`. ``layer(input, residual, mask, domain)``.

    Args:
        num_features: C, the number of channels.
        activation: "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", or None for the identity.
        eps, momentum, affine, track_running_stats, device, dtype, bias: of ``norm``, see `BatchNorm2d`.
        negative_slope: of "leaky_relu".
        inplace: the output may take the input's place in eager training on the CPU, for "leaky_relu" and None, where γ
            and β let the input be told from the output (docs/in-place.md). Only for an input that nobody else reads.
        save_memory: the next operators keep no output for their backward: it is computed again from the input, bit for
            bit (docs/memory.md). Not with a residual. It takes the place of `inplace`.
        ghost_batch_size, renorm, process_group, nonfinite, feature_axis, accumulation_steps, domains, domain_affine:
            of ``norm``, see `BatchNorm2d`.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: at construction, an unknown activation, a keyword that cannot be, or two that cannot be together; in
            the call, a residual of another shape, and all that `BatchNorm2d` refuses.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; the addition before the activation: He et al. 2016,
    https://arxiv.org/abs/1512.03385.
    """

    norm_type = BatchNorm2d


class BatchNormAct3d(BatchNormActBase):
    r"""Normalize each channel of (N, C, D, H, W) over the batch, add a residual and activate, in one operator.

    .. math:: y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma +
        \beta + \mathrm{residual}\right)

    A module with two children: ``norm``, a `BatchNorm3d`, and ``act``, the activation's own module. One operator
    computes both, and keeps for the backward what the normalization alone would keep. While a hook looks at a child, or
    a child is wrapped, parametrized, compiled or replaced by something else, the children are called one after the
    other, with the same values: whatever a tool does to a child is respected.

    Shape and dtype:
        input, residual and output: (N, C, D, H, W), as `BatchNorm3d`. ``layer(input, residual, mask, domain)``.

    Args:
        num_features: C, the number of channels.
        activation: "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", or None for the identity.
        eps, momentum, affine, track_running_stats, device, dtype, bias: of ``norm``, see `BatchNorm3d`.
        negative_slope: of "leaky_relu".
        inplace: the output may take the input's place in eager training on the CPU, for "leaky_relu" and None, where γ
            and β let the input be told from the output (docs/in-place.md). Only for an input that nobody else reads.
        save_memory: the next operators keep no output for their backward: it is computed again from the input, bit for
            bit (docs/memory.md). Not with a residual. It takes the place of `inplace`.
        ghost_batch_size, renorm, process_group, nonfinite, feature_axis, accumulation_steps, domains, domain_affine:
            of ``norm``, see `BatchNorm3d`.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: at construction, an unknown activation, a keyword that cannot be, or two that cannot be together; in
            the call, a residual of another shape, and all that `BatchNorm3d` refuses.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; the addition before the activation: He et al. 2016,
    https://arxiv.org/abs/1512.03385.
    """

    norm_type = BatchNorm3d
