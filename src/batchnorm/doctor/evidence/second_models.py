"""The models that a training step uses beside the one that is examined, by the names that it has for them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["models_of"]


def models_of(step: Any) -> dict[str, nn.Module]:
    """Return the modules among what the step's closure, its globals and its object hold, and in these objects."""
    found: dict[str, nn.Module] = {}
    for name, value in _held(step):
        inner = value.items() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).items()
        parts = [(name, value)] if isinstance(value, nn.Module) else [(f"{name}.{key}", part) for key, part in inner]
        found |= {key: part for key, part in parts if isinstance(part, nn.Module)}
    return found


def _held(step: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(step, functools.partial):
        yield from (*((f"argument {n}", value) for n, value in enumerate(step.args)), *step.keywords.items())
        yield from _held(step.func)
        return
    owner = getattr(step, "__self__", None if inspect.isfunction(step) else step)
    yield from getattr(owner, "__dict__", {}).items()
    function = getattr(step, "__func__", step if inspect.isfunction(step) else type(step).__call__)
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(inspect.unwrap(function))
        yield from (*variables.nonlocals.items(), *variables.globals.items())
