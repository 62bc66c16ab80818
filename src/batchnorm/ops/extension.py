"""Load the compiled CPU kernels, if they were built. They register themselves under the operators' names."""

from __future__ import annotations

import functools
import importlib
import logging
import re
from pathlib import Path
from types import ModuleType

import torch

LOADED = False
PROBLEM = "was not built"


def load() -> bool:
    """Load the compiled kernels. Returns whether they serve the CPU; the reference does if not."""
    global LOADED, PROBLEM
    if LOADED:
        return True
    for path in sorted(Path(__file__).parent.parent.glob("_C.*")):
        try:
            torch.ops.load_library(str(path))
        except OSError as error:  # built for another platform, or against a torch with another ABI
            PROBLEM = f"does not load ({error})"
        else:
            LOADED = True
            return True
    return False


def autograd_module(torch_version: str) -> ModuleType | None:
    """Import the autograd calls in C++ (csrc/autograd) that were built against this version of torch.

    They use torch's C++ ABI, which differs between versions: another version might crash instead of raising an error.
    Hence the file name contains the version, and only the file of this version is imported.

    Returns:
        The module; None where it was not built. Python code then does the same work.
    """
    try:
        return importlib.import_module("batchnorm._autograd_" + re.sub(r"\W", "_", torch_version))
    except (ImportError, OSError):
        return None


@functools.cache
def say_slower() -> None:
    """Log a warning once, when the reference first computes on a CPU tensor.

    The import of this module does not log it, because a program that only uses a GPU needs no CPU kernels.
    """
    logging.getLogger("batchnorm").warning(
        "the compiled CPU kernels are missing: results are the same, CPU tensors are slower. The extension %s; "
        "reinstall batchnorm with a C++ compiler at hand",
        PROBLEM,
    )


def empty_cache() -> int:
    """Give cached memory of large outputs back to the system.

    Outputs of 1 MiB and more on the CPU use cached blocks. A freed block is cached for the next output of its size,
    because the system would have to zero the pages of a new block. A block that is idle for ten seconds is freed when
    the next output is allocated or freed. ``BATCHNORM_CACHE_MIB`` limits the size of the cache: it is read once, the
    default is an eighth of the machine's memory, and 0 turns the cache off.

    Returns:
        The number of bytes that were freed.
    """
    return int(torch.ops.batchnorm.empty_cache()) if LOADED else 0


load()
