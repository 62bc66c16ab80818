"""Batch normalization for PyTorch, end to end. The names that users import; nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import functional, registrations  # noqa: F401  # enters our layers in the tables of torch.ao
from ._version import __version__
from .domains import use_domain
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .moments import Renorm, lengths_to_mask
from .norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .ops.extension import empty_cache

if TYPE_CHECKING:
    from .doctor.examine import diagnose
    from .experiment.study import study
    from .monitor import Monitor
    from .surgery.convert import convert, revert
    from .surgery.fold import fold
    from .surgery.fold_onnx import fold_onnx
    from .surgery.freeze import freeze, unfreeze
    from .surgery.fuse import fuse
    from .surgery.insert import insert, strip
    from .surgery.params import copy_statistics, importance, param_groups
    from .surgery.recalibrate import recalibrate

# What needs more than torch, or more than a layer, is imported when it is first asked for.
_LAZY = {
    "Monitor": ".monitor",
    "convert": ".surgery",
    "copy_statistics": ".surgery",
    "diagnose": ".doctor",
    "fold": ".surgery",
    "fold_onnx": ".surgery",
    "freeze": ".surgery",
    "fuse": ".surgery",
    "importance": ".surgery",
    "insert": ".surgery",
    "param_groups": ".surgery",
    "recalibrate": ".surgery",
    "revert": ".surgery",
    "strip": ".surgery",
    "study": ".experiment.study",
    "unfreeze": ".surgery",
}

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Monitor",
    "Renorm",
    "__version__",
    "convert",
    "copy_statistics",
    "diagnose",
    "empty_cache",
    "fold",
    "fold_onnx",
    "freeze",
    "functional",
    "fuse",
    "importance",
    "insert",
    "lengths_to_mask",
    "param_groups",
    "recalibrate",
    "revert",
    "strip",
    "study",
    "unfreeze",
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
