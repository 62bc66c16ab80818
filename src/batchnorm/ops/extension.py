"""Loads the compiled CPU kernels, where they were built. They register themselves under the operators' names."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from . import schemas as _schemas  # the operators that the kernels register themselves for

LOADED = False


def load() -> bool:
    """Whether the compiled kernels serve the CPU. Without them the reference does, and the log says so once."""
    global LOADED
    if LOADED:
        return True
    problem = "was not built"
    for path in sorted(Path(__file__).parent.parent.glob("_C.*")):
        try:
            torch.ops.load_library(str(path))
        except OSError as error:  # built for another platform, or against a torch with another ABI
            problem = f"does not load ({error})"
        else:
            LOADED = True
            return True
    logging.getLogger("batchnorm").warning(
        "batchnorm: the compiled CPU kernels are missing, results are the same but CPU tensors are slower:"
        " the extension %s; reinstall with a C++ compiler at hand", problem
    )
    return False


load()
