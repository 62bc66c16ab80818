"""The operators `torch.ops.batchnorm.*`: their schemas, their meaning, their kernels and their derivatives.

This package knows no layer and no variant.
"""

# `schemas` comes before `autograd`: it defines torch.ops.batchnorm, in which `autograd` looks the operators up.
# `extension` loads the compiled CPU kernels.
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
