"""The command line: arguments, exit codes and the names of flags. The work is done on the floors below."""

from .entry import main

__all__ = ["main"]
