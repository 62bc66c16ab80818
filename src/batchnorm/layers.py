"""Floor 4: BatchNorm1d, BatchNorm2d and BatchNorm3d. Arguments, buffers and the call; the work is `functional`'s."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .checks import check_activation
from .functional import batch_norm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _Layer(nn.modules.batchnorm._BatchNorm):
    """What the three layers add to torch's of the same name.

    The class attributes are the defaults of a layer that was never constructed here: one that was pickled by torch,
    or converted by changing its class.
    """

    activation: str | None = None
    negative_slope: float = 0.01
    ghost_batch_size: int | None = None
    renorm: Any = None
    process_group: Any = None
    nonfinite: str = "propagate"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        ghost_batch_size: int | None = None,
        renorm: Any = None,
        process_group: Any = None,
        nonfinite: str = "propagate",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:  # torch takes this keyword from 2.12 on only
            self.register_parameter("bias", None)
        check_activation(activation)
        later = {"ghost_batch_size": ghost_batch_size, "renorm": renorm, "process_group": process_group}
        later["nonfinite"] = None if nonfinite == "propagate" else nonfinite
        for name, value in later.items():
            if value is not None:
                raise NotImplementedError(f"{name} is not there yet: it arrives with the variants")
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``activation(batch_norm(input) + residual)``; see `batchnorm.functional.batch_norm`."""
        if not isinstance(cast(object, input), fx.Proxy):  # under symbolic tracing there is no shape to look at
            self._check_input_dim(input)
        keep = self.track_running_stats or not self.training
        running_mean = self.running_mean if keep else None
        running_var = self.running_var if keep else None
        training = self.training or (running_mean is None and running_var is None)
        return batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
            negative_slope=self.negative_slope,
            num_batches_tracked=self.num_batches_tracked if training else None,
        )

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        if self.activation is not None:
            extra += f", activation={self.activation}"
        return extra


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    pass


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    pass


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    pass


_DOC = r"""{torch} over {shape}, exactly and in one pass, with the activation and the residual in it.

    .. math:: y = \mathrm{{activation}}\left(\frac{{x - \mathrm{{E}}[x]}}{{\sqrt{{\mathrm{{Var}}[x] + \epsilon}}}}
        \gamma + \beta + \mathrm{{residual}}\right)

    A drop-in for :class:`torch.nn.{name}`, of which it is a subclass: the same positional arguments, parameters,
    buffers and ``state_dict``. ``momentum`` is the weight of the NEW batch; the buffers keep the unbiased variance.

    Args:
        num_features: C, the size of axis 1.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as torch's.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh"; after the residual.
        negative_slope: of "leaky_relu".

    Shape:
        input, residual and output: {shape}.

    Raises:
        ValueError: at construction, an unknown activation; in the call, an input of other dimensions, or one value a
            channel in training.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """

for _class, _shape in (
    (BatchNorm1d, "(N, C) or (N, C, L)"),
    (BatchNorm2d, "(N, C, H, W)"),
    (BatchNorm3d, "(N, C, D, H, W)"),
):
    _class.__doc__ = _DOC.format(name=_class.__name__, torch="Batch normalization", shape=_shape)
