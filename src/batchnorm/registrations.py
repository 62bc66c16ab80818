"""Eager quantization goes by a module's exact type: its fusers are entered for our layers as for torch's.

`torch.ao.quantization.fuse_modules` looks there. A tool that compares types without a table (FX quantization,
`torch.fx.experimental.optimization.fuse`) leaves our layers as they are: right, but not fused; give it
`batchnorm.revert(model)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .twins import TORCH_TYPES, torch_twin


def _register_fusers() -> None:
    try:
        from torch.ao.quantization import fuser_method_mappings
    except ImportError:  # a torch that has given its quantization away
        return
    table: dict[Any, Any] = getattr(fuser_method_mappings, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    ours = {theirs: kind for kind, theirs in TORCH_TYPES.items()}
    for types, method in list(table.items()):
        if any(kind in ours for kind in types):
            table.setdefault(tuple(ours.get(kind, kind) for kind in types), _through_twins(method))


def _through_twins(method: Callable[..., Any]) -> Callable[..., Any]:
    """The fuser, given torch's layers in the place of ours; it asks for the exact types once more."""

    def fuse(is_qat: bool, *modules: Any) -> Any:
        return method(is_qat, *(torch_twin(m) if type(m) in TORCH_TYPES else m for m in modules))

    return fuse


_register_fusers()
