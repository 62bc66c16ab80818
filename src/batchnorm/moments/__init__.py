"""Floor 2: where the moments come from. One small file a source; each is a pair of functions, adjoint to each other.

masked and ghost statistics are arguments of the operators (`mask`, `slice_size`); what must happen between `stats` and
`apply`, and between `backward_reduce` and `backward_elemt`, is here: synchronized, renormalized, merged.
"""

from .masked import flat_mask, lengths_to_mask
from .merged import merge
from .renorm import Renorm
from .sourced import Moments, Reference, differentiable_batch_norm, sourced_batch_norm
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
