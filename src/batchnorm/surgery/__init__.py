"""Floor 5: tools that change a model someone else wrote, or take its batch normalization out for deployment."""

from .convert import convert, revert
from .freeze import freeze, unfreeze
from .insert import insert, strip

__all__ = ["convert", "freeze", "insert", "revert", "strip", "unfreeze"]
