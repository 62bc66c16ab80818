"""Finding a user's function by its name, ``pkg.mod:function`` or ``path/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, quote_error

__all__ = ["find_factory", "import_first"]


def find_factory(
    name: str, parameter: str, returns: str = "a torch.nn.Module", built_in: Sequence[str] = ()
) -> Callable[..., Any]:
    """Return the function that ``pkg.mod:function`` or ``path/file.py:function`` names.

    A module is looked up from the current folder first.

    Args:
        name: what the user gave.
        parameter: to what they gave it, as in ``study(model=…)``; this and what follows is for the messages.
        returns: what such a function returns.
        built_in: the names that need no module.

    Raises:
        UserError: no such module or function, or the module's own code raises.
    """
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        known = f"one of {', '.join(built_in)} or " if built_in else ""
        raise UserError(f"unknown name {name!r}, {parameter}, give {known}pkg.mod:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = _run_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise UserError(
            f"cannot be imported ({quote_error(error)}), {parameter} {name}, correct the name or the module"
        ) from error
    if not callable(found):
        raise UserError(f"{attribute} is no function, {parameter} {name}, name a function that returns {returns}")
    return found


def _run_file(path: Path) -> Any:
    """Import a file that need not be importable by its name; what lies beside it is."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}")
    if (beside := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, beside)
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path.resolve()):
        return loaded
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # pickling and dataclasses look a module up there
    spec.loader.exec_module(module)
    return module


def import_first(library: str, *names: str) -> Any:
    """Return the first of the classes ``module:class`` whose library is installed.

    Raises:
        UserError: none is.
    """
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError:
            continue
    raise UserError(f"{library} is not installed, its callback needs it, install it with pip install {library}")
