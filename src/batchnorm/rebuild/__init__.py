"""Outputs that a backward computes again instead of keeping them (`save_memory=True`).

A saved-tensor hook is put on each tensor that another operator saved and that a normalization's output tells: the
output itself, a view of it, or one activation or cast of it. The hook holds a `Recipe` in its place.
"""

from .calls import can_rebuild, mark_output, release_saved

__all__ = ["can_rebuild", "mark_output", "release_saved"]
