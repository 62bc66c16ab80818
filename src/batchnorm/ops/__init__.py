"""Floor 1: the operators, their meaning, and their derivatives. Knows of no layer and no variant."""

from . import schemas as _schemas  # defines torch.ops.batchnorm; the extension, where built, takes the CPU
from .activations import ACTIVATIONS, activate
from .autograd import BatchStatistics, FixedStatistics

__all__ = ["ACTIVATIONS", "BatchStatistics", "FixedStatistics", "activate"]
