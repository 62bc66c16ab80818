"""Gives the operators their CUDA kernels, where torch was built for CUDA and Triton is installed.

Nothing is imported until a CUDA tensor reaches an operator: `import batchnorm` neither starts CUDA nor loads Triton.
What the kernels do not cover (an empty tensor, a dtype beyond float16/bfloat16/float32/float64, a GPU that Triton does
not compile for) goes to the reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import fused, reference

# update_running_ stays the reference's few tensor operations: vectors of C values, no sweep over the input.
REFERENCE: dict[str, Callable[..., Any]] = {
    "stats": reference.stats,
    "apply": reference.apply,
    "backward_reduce": reference.backward_reduce,
    "backward_elemt": reference.backward_elemt,
    "forward": fused.forward,
    "backward": fused.backward,
}
LEAST_CAPABILITY = (7, 5)  # Turing: what Triton's current releases still compile for


@lru_cache
def _compiles_for(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def kernel(name: str) -> Callable[..., Any]:
    """The Triton implementation of an operator, imported now."""
    found: Callable[..., Any] = getattr(importlib.import_module(f".{name}", __package__), name)
    return found


def covers(input: Tensor) -> bool:
    """Whether the kernels take this tensor: not empty, and of a dtype they compute in."""
    return input.numel() > 0 and input.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def chosen(name: str) -> Callable[..., Any]:
    """What is registered for CUDA: the kernel on the input's device, or the reference."""
    place = 1 if name.startswith("backward") else 0  # grad_output stands before the input

    def implementation(*arguments: Any) -> Any:
        input: Tensor = arguments[place]
        if not (covers(input) and _compiles_for(input.device)):
            return REFERENCE[name](*arguments)
        with torch.cuda.device(input.device):  # Triton launches on the current device
            return kernel(name)(*arguments)

    return implementation


def register() -> torch.library.Library | None:
    """Register for CUDA; None, and nothing done, where this torch or this machine cannot run Triton on it."""
    if torch.version.cuda is None or find_spec("triton") is None:
        return None
    library = torch.library.Library("batchnorm", "IMPL")
    for name in REFERENCE:
        library.impl(name, chosen(name), "CUDA")
    return library


_LIBRARY = register()  # registrations live as long as this object
