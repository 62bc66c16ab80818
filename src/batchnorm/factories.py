"""Finding a user's function by the name that the command line gives it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, quote_error

__all__ = ["find_factory"]


def find_factory(name: str, option: str = "--model", built_in: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the function that ``pkg.mod:function`` names, looked up from the current folder first; `option` is
    what the user gave the name to and `built_in` the names that need no module, for the messages.

    Raises:
        UserError: no such module or function, or the module's own code raises.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        known = f"one of {', '.join(built_in)} or " if built_in else ""
        raise UserError(f"unknown {option.strip('-')} {name!r}, {option}, give {known}pkg.mod:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise UserError(
            f"cannot be imported ({quote_error(error)}), {option} {name}, correct the name or the module"
        ) from error
    if not callable(found):
        wanted = "the data" if option == "--data" else "a torch.nn.Module"
        raise UserError(f"{attribute} is no function, {option} {name}, name a function that returns {wanted}")
    return found
