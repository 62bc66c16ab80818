"""What the fused operators take by value, beside their tensors."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """The last four arguments of `apply`, `forward` and `backward`, in their order."""

    eps: float
    activation: str = ""  # empty: none
    negative_slope: float = 0.01  # of "leaky_relu"
    slice_size: int = 0  # samples a slice has its own statistics for; 0: the whole batch
