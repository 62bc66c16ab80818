"""The sources of the moments, one small file for each.

Masked and ghost statistics are arguments of the operators (`mask`, `slice_size`). Synchronized and renormalized
statistics change the moments between `stats` and `apply`, and the sums between `backward_reduce` and `backward_elemt`.
Each is a pair of functions: one for the moments, and its adjoint for the sums.
"""

from .masked import flat_mask, lengths_to_mask
from .merged import merge
from .renorm import Reference, Renorm
from .sourced import Moments, differentiable_batch_norm, sourced_batch_norm
from .synchronized import ProcessGroupLike, check_group, resolve

__all__ = [
    "Moments",
    "ProcessGroupLike",
    "Reference",
    "Renorm",
    "check_group",
    "differentiable_batch_norm",
    "flat_mask",
    "lengths_to_mask",
    "merge",
    "resolve",
    "sourced_batch_norm",
]
