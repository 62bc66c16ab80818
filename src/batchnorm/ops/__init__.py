"""Floor 1: the operators, their meaning, and their derivatives. Knows of no layer and no variant."""

# schemas defines torch.ops.batchnorm: must come before autograd, which looks the names up; extension takes the CPU
from . import extension, schemas
from .activations import ACTIVATIONS, activate
from .autograd import BatchStatistics, FixedStatistics, InPlaceCall, TrainingCall, fits, may_overwrite, training_call
from .triton import register

__all__ = [
    "ACTIVATIONS",
    "BatchStatistics",
    "FixedStatistics",
    "InPlaceCall",
    "TrainingCall",
    "activate",
    "extension",
    "fits",
    "may_overwrite",
    "register",
    "schemas",
    "training_call",
]
