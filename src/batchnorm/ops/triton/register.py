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

REFERENCE: dict[str, Callable[..., Any]] = {
    "stats": reference.stats,
    "apply": reference.apply,
    "backward_reduce": reference.backward_reduce,
    "backward_elemt": reference.backward_elemt,
    "forward": fused.forward,
    "backward": fused.backward,
    "update_running_": fused.update_running_,
    "forward_update_running_": fused.forward_update_running_,
}
# Where the tensor stands that decides: the input, which comes after a grad_output; the mean, which comes after buffers.
PLACE = {"backward_reduce": 1, "backward_elemt": 1, "backward": 1, "update_running_": 3}
# The file where it is not the operator's name
HOME = {"forward_update_running_": "forward"}
MOST_LINES = 2**31 - 2**14  # numbered in 32 bits, as are those that the last tile has beyond them
LEAST_CAPABILITY = (7, 5)  # Turing: what Triton's current releases still compile for


@lru_cache
def _compiles_for(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def kernel(name: str) -> Callable[..., Any]:
    """The Triton implementation of an operator, imported now."""
    found: Callable[..., Any] = getattr(importlib.import_module(f".{HOME.get(name, name)}", __package__), name)
    return found


def covers(input: Tensor) -> bool:
    """Whether the kernels take this tensor: not empty, of a dtype they compute in, no more lines than have numbers."""
    known = input.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return known and 0 < input.numel() < MOST_LINES * input.size(-1 if input.dim() < 2 else 1)


def chosen(name: str) -> Callable[..., Any]:
    """What is registered for CUDA: the kernel on the input's device, or the reference."""
    place = PLACE.get(name, 0)

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
