"""Tools that change a model someone else wrote, or take its batch normalization out for deployment."""

from .convert import convert, revert
from .fold import Fold, Folded, FoldReport, fold
from .fold_onnx import fold_onnx
from .freeze import freeze, unfreeze
from .fuse import fuse
from .insert import insert, strip
from .params import Importance, copy_statistics, importance, param_groups
from .recalibrate import Recalibration, Shift, recalibrate

__all__ = [
    "Fold",
    "FoldReport",
    "Folded",
    "Importance",
    "Recalibration",
    "Shift",
    "convert",
    "copy_statistics",
    "fold",
    "fold_onnx",
    "freeze",
    "fuse",
    "importance",
    "insert",
    "param_groups",
    "recalibrate",
    "revert",
    "strip",
    "unfreeze",
]
