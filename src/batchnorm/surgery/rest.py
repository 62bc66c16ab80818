"""What stays of a batch normalization once the normalization is taken out of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..ops import activate

__all__ = ["Unnormalized", "rest_of"]

_TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_OUR_FORWARDS = (BatchNorm1d.forward, BatchNorm2d.forward, BatchNorm3d.forward)


class Unnormalized(nn.Identity):
    """One of our layers without its normalization: `activation(input + residual)`."""

    def __init__(self, activation: str | None, negative_slope: float) -> None:
        super().__init__()
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None, domain: Any = None
    ) -> Tensor:
        total = input if residual is None else input + residual
        return activate(total, self.activation or "", self.negative_slope)

    def extra_repr(self) -> str:
        return f"activation={self.activation}" if self.activation else ""


def rest_of(norm: Any) -> nn.Module | None:
    """The module to stand in the layer's place; None for another library's layer whose forward may do more."""
    forward = type(norm).forward
    if forward in _TORCH_FORWARDS:
        rest: nn.Module = nn.Identity()
    elif forward in _OUR_FORWARDS:
        rest = Unnormalized(norm.activation, norm.negative_slope)
    else:
        return None
    rest.training = norm.training
    return rest
