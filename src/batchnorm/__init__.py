"""Batch normalization for PyTorch, end to end. The names that users import; nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import functional
from ._version import __version__
from .bookkeeping import use_domain
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .moments import Renorm, lengths_to_mask

if TYPE_CHECKING:
    from .experiment.study import study
    from .surgery.insert import insert, strip

# What needs more than torch, or more than a layer, is imported when it is first asked for.
_LAZY = {
    "insert": ".surgery",
    "strip": ".surgery",
    "study": ".experiment.study",
}

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Renorm",
    "__version__",
    "functional",
    "insert",
    "lengths_to_mask",
    "strip",
    "study",
    "use_domain",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
