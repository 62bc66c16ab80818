"""Names what is wrong with batch normalization in a model, and repairs it."""

from .diagnosis import Diagnosis, Finding
from .examine import diagnose

__all__ = ["Diagnosis", "Finding", "diagnose"]
