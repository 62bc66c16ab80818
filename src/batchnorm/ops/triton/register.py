"""Register the Triton kernels as the operators' CUDA kernels, where torch has CUDA and Triton is installed.

Triton is imported when a CUDA tensor first reaches an operator, so `import batchnorm` neither starts CUDA nor loads
Triton. Tensors that the kernels do not cover go to the reference: an empty tensor, a dtype other than float16,
bfloat16, float32 and float64, or a GPU that Triton does not compile for.
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
# The index of the argument that decides whether a kernel covers the call: the input or, for the buffers, the mean.
ARGUMENT = {"backward_reduce": 1, "backward_elemt": 1, "backward": 1, "update_running_": 3}
# The module, where its name is not the operator's.
MODULE = {"forward_update_running_": "forward"}
MAX_ROWS = 2**31 - 2**14  # kernels number rows in 32 bits, also the rows of the last tile beyond the tensor
MIN_CAPABILITY = (7, 5)  # Turing: the oldest GPU that Triton's current releases compile for


@lru_cache
def _compiles_for(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def kernel(name: str) -> Callable[..., Any]:
    """Import the Triton implementation of an operator."""
    found: Callable[..., Any] = getattr(importlib.import_module(f".{MODULE.get(name, name)}", __package__), name)
    return found


def covers(input: Tensor) -> bool:
    """Return whether the kernels take a tensor: by its dtype, and by its number of rows, which must not be 0."""
    supported = input.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return supported and 0 < input.numel() < MAX_ROWS * input.size(-1 if input.dim() < 2 else 1)


def cuda_implementation(name: str) -> Callable[..., Any]:
    """Make the function that is registered for CUDA: the kernel on the input's device, or the reference."""
    index = ARGUMENT.get(name, 0)

    def implementation(*arguments: Any) -> Any:
        input: Tensor = arguments[index]
        if not (covers(input) and _compiles_for(input.device)):
            return REFERENCE[name](*arguments)
        with torch.cuda.device(input.device):  # because Triton launches on the current device
            return kernel(name)(*arguments)

    return implementation


def register() -> torch.library.Library | None:
    """Register the kernels for CUDA. Returns None, without an effect, where torch has no CUDA or Triton is missing."""
    if torch.version.cuda is None or find_spec("triton") is None:
        return None
    library = torch.library.Library("batchnorm", "IMPL")
    for name in REFERENCE:
        library.impl(name, cuda_implementation(name), "CUDA")
    return library


_LIBRARY = register()  # registrations live as long as this object
