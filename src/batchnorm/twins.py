"""The same layer as another class: one of ours for one of torch's and back, with the same tensors and hooks inside."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["TORCH_TYPES", "drop_own", "same_insides", "torch_twin"]

TORCH_TYPES: dict[type, type] = {
    BatchNorm1d: nn.BatchNorm1d,
    BatchNorm2d: nn.BatchNorm2d,
    BatchNorm3d: nn.BatchNorm3d,
}
# what a layer of ours holds beside what torch's holds
_OWN = (vars(BatchNorm2d(1)).keys() - vars(nn.BatchNorm2d(1)).keys()) | {"frozen", "domain", "save_memory"}


def same_insides(module: nn.Module, kind: Any) -> Any:
    """A `kind` with the module's parameters and buffers.

    It shares the dicts of hooks, since their handles hold on to those. A setting that adds a buffer adds it to the new
    one alone.
    """
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        new.__dict__[name] = copy.copy(new.__dict__[name])
    return new


def torch_twin(layer: nn.Module, kind: Any = None) -> Any:
    """The layer as torch's of the same name, or as `kind`, without what torch's does not hold."""
    new = same_insides(layer, kind or TORCH_TYPES[type(layer)])
    drop_own(new)
    return new


def drop_own(module: nn.Module) -> None:
    """Take out what only a layer of ours holds."""
    module._buffers.pop("num_batches_skipped", None)
    for name in _OWN:
        module.__dict__.pop(name, None)
