"""Where in the user's sources a layer is made: the line that assigns it, else the function that makes the model."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Location", "locate"]


class Location(NamedTuple):
    """A file, relative to the current folder, and a line in it."""

    path: str
    line: int


def locate(model: nn.Module | Path, factory: Callable[..., Any] | None, layer: str) -> Location | None:
    """Return where the layer is made; None where no source of the user's is found.

    Args:
        model: the examined model, or the path of a file.
        factory: the function that made the model.
        layer: the layer's dotted name.
    """
    if isinstance(model, Path):
        return Location(_relative(model), 1)
    parts = layer.split(".") if layer else []
    for depth in range(len(parts) - 1, -1, -1):
        try:
            owner = model.get_submodule(".".join(parts[:depth]))
        except AttributeError:  # a functional call
            continue
        found = _assignment(type(owner), parts[depth])
        if found is not None:
            return found
    return _definition(factory) if factory is not None else None


def _assignment(owner: type, name: str) -> Location | None:
    path = _own_source(owner)
    if path is None:
        return None
    lines, first = inspect.getsourcelines(owner)
    # Several layers may be assigned in one line: self.conv, self.bn = …
    pattern = re.compile(rf"\bself\.{re.escape(name)}\b[^=]*=[^=]")
    offset = next((n for n, line in enumerate(lines) if pattern.search(line)), 0)
    return Location(_relative(path), first + offset)


def _definition(factory: Callable[..., Any]) -> Location | None:
    path = _own_source(factory)
    if path is None:
        return None
    return Location(_relative(path), max(1, inspect.getsourcelines(factory)[1]))


def _own_source(thing: Any) -> Path | None:
    """Return the file of a class or function; None for torch's and other installed packages' ones."""
    try:
        path = Path(inspect.getsourcefile(thing) or "").resolve()
        inspect.getsourcelines(thing)
    except (OSError, TypeError):
        return None
    return None if "site-packages" in path.parts or not path.is_relative_to(Path.cwd()) else path


def _relative(path: Path) -> str:
    return Path(os.path.relpath(path)).as_posix() if path.resolve().is_relative_to(Path.cwd()) else path.as_posix()
