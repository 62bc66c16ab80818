"""The arguments of the operators that are numbers and words, not tensors."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """Four arguments that `apply`, `forward` and `backward` share, in the order of their schemas."""

    eps: float
    activation: str = ""  # empty: no activation
    negative_slope: float = 0.01  # only "leaky_relu" reads it
    slice_size: int = 0  # samples per ghost slice, each with its own statistics; 0: one slice, the entire batch
