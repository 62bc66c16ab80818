"""Classes made on the fly: a module's own class with one of ours before it, so that every `isinstance` still holds."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

__all__ = ["Derived", "derived_class", "original_class"]


class Derived:
    """What is put before a module's class; its subclasses say what changes."""

    prefix: ClassVar[str] = ""  # of the new class's name
    derived_from: ClassVar[tuple[type, type]]  # what was put before, and the module's own class

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly, so a pickle or a deep copy has to make it again.
        return _restore, type(self).derived_from, self.__getstate__()


def _restore(mixin: Any, base: Any) -> Any:
    kind: Any = derived_class(mixin, base)
    return kind.__new__(kind)


@cache
def derived_class(mixin: Any, base: Any) -> type:
    """`base` with `mixin` before it; the same class each time."""
    body = {"__module__": base.__module__, "__doc__": base.__doc__, "derived_from": (mixin, base)}
    return type(f"{mixin.prefix}{base.__name__}", (mixin, base), body)


def original_class(kind: type, mixin: type[Derived]) -> type:
    """The class before `mixin` was put before it; any other class as it is."""
    made_from = kind.__dict__.get("derived_from")
    return made_from[1] if made_from is not None and made_from[0] is mixin else kind
