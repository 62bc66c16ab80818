"""Floor 6: names what is wrong with batch normalization in a model, and mends it."""

from .diagnose import diagnose
from .diagnosis import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "diagnose"]
