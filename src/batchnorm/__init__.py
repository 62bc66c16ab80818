"""Batch normalization for PyTorch, end to end. The names that users import; nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import functional, registrations  # noqa: F401  # enters our layers in the tables of torch.ao
from ._version import __version__
from .domains import use_domain
from .errors import UserError
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .moments import Renorm, lengths_to_mask
from .norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .ops.extension import empty_cache

if TYPE_CHECKING:
    from .doctor.examine import diagnose
    from .experiment.analyze import analyze
    from .experiment.recorded.recorder import StudyRecorder
    from .experiment.recorded.recorder_callbacks import recorder_for_lightning, recorder_for_transformers
    from .experiment.study import study
    from .model_tools.convert import convert, revert
    from .model_tools.fold import fold
    from .model_tools.fold_onnx import fold_onnx
    from .model_tools.freeze import freeze, unfreeze
    from .model_tools.fuse import fuse
    from .model_tools.insert import insert, strip
    from .model_tools.params import copy_statistics, importance, param_groups
    from .model_tools.recalibrate import recalibrate
    from .monitor import Monitor

# What needs more than torch, or more than a layer, is imported when it is first asked for.
_LAZY = {
    "Monitor": ".monitor",
    "StudyRecorder": ".experiment.recorded.recorder",
    "analyze": ".experiment.analyze",
    "convert": ".model_tools",
    "copy_statistics": ".model_tools",
    "diagnose": ".doctor",
    "fold": ".model_tools",
    "fold_onnx": ".model_tools",
    "freeze": ".model_tools",
    "fuse": ".model_tools",
    "importance": ".model_tools",
    "insert": ".model_tools",
    "param_groups": ".model_tools",
    "recalibrate": ".model_tools",
    "recorder_for_lightning": ".experiment.recorded.recorder_callbacks",
    "recorder_for_transformers": ".experiment.recorded.recorder_callbacks",
    "revert": ".model_tools",
    "strip": ".model_tools",
    "study": ".experiment.study",
    "unfreeze": ".model_tools",
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
    "StudyRecorder",
    "UserError",
    "__version__",
    "analyze",
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
    "recorder_for_lightning",
    "recorder_for_transformers",
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
