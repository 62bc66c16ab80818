"""Finding a user's function by its name, ``pkg.mod:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, quote_error

__all__ = ["find_factory"]


def find_factory(
    name: str, parameter: str, returns: str = "a torch.nn.Module", built_in: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return the function that ``pkg.mod:function`` names, looked up from the current folder first.

    Args:
        name: what the user gave.
        parameter: to what they gave it, as in ``study(model=…)``; this and what follows is for the messages.
        returns: what such a function returns.
        built_in: the names that need no module.

    Raises:
        UserError: no such module or function, or the module's own code raises.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        known = f"one of {', '.join(built_in)} or " if built_in else ""
        raise UserError(f"unknown name {name!r}, {parameter}, give {known}pkg.mod:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise UserError(
            f"cannot be imported ({quote_error(error)}), {parameter} {name}, correct the name or the module"
        ) from error
    if not callable(found):
        raise UserError(f"{attribute} is no function, {parameter} {name}, name a function that returns {returns}")
    return found
