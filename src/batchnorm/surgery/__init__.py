"""Floor 5: tools that change a model someone else wrote, or take its batch normalization out for deployment."""

from .insert import insert, strip

__all__ = ["insert", "strip"]
