"""Loads the compiled CPU kernels, where they were built. They register themselves under the operators' names."""

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
    """Whether the compiled kernels serve the CPU; without them the reference does."""
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
    """The training call in C++ (csrc/autograd), if there is one that was built against this torch.

    It uses torch's own ABI, which holds for one version: opened by another, it might crash rather than fail. So the
    name says which, and no other is looked for. Nobody has to know: without it the same work is done from Python.
    """
    try:
        return importlib.import_module("batchnorm._autograd_" + re.sub(r"\W", "_", torch_version))
    except (ImportError, OSError):
        return None


@functools.cache
def say_slower() -> None:
    """Say once, when the reference first serves a CPU tensor: an import alone, or a GPU, needs no kernels."""
    logging.getLogger("batchnorm").warning(
        "the compiled CPU kernels are missing: results are the same, CPU tensors are slower. The extension %s; "
        "reinstall batchnorm with a C++ compiler at hand",
        PROBLEM,
    )


def empty_cache() -> int:
    """Give the memory that large outputs left behind back to the system; returns the bytes freed.

    Outputs of 1 MiB and more on the CPU come from blocks that are kept for the next output of their size: the system
    would zero the pages of fresh ones. Idle blocks go by themselves after ten seconds (looked at when the next output
    is made or freed) or beyond ``BATCHNORM_CACHE_MIB`` (read once; an eighth of the machine's memory; 0 keeps none).
    """
    return int(torch.ops.batchnorm.empty_cache()) if LOADED else 0


load()
