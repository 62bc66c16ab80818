"""Floor 1: the operators, their meaning, and their derivatives. Knows of no layer and no variant."""

# schemas defines torch.ops.batchnorm: must come before autograd, which looks the names up; extension takes the CPU
from . import extension, schemas
from .activations import ACTIVATIONS, activate
from .autograd import (
    BatchStatistics,
    FixedStatistics,
    InPlaceCall,
    TrainingCall,
    may_overwrite,
    plain_running_call,
    plain_training_call,
    training_call,
)
from .form import Form
from .triton import register

__all__ = [
    "ACTIVATIONS",
    "BatchStatistics",
    "FixedStatistics",
    "Form",
    "InPlaceCall",
    "TrainingCall",
    "activate",
    "extension",
    "may_overwrite",
    "plain_running_call",
    "plain_training_call",
    "register",
    "schemas",
    "training_call",
]
