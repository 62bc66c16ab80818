"""What stays of a batch normalization once the normalization is taken out of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..inspect.folding import only_normalizes
from ..pairs import is_ours

__all__ = ["Unnormalized", "rest_of"]


class Unnormalized(nn.Identity):
    """Stands for one of our layers, which may be called with a mask and a domain."""

    def forward(self, input: Tensor, mask: Tensor | None = None, domain: Any = None) -> Tensor:
        return input


def rest_of(norm: Any) -> nn.Module | None:
    """The module to stand in the layer's place; None for another library's layer whose forward may do more."""
    if not only_normalizes(norm):
        return None
    rest = Unnormalized() if is_ours(norm) else nn.Identity()
    rest.training = norm.training
    return rest
