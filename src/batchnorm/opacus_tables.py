"""Opacus goes by a module's exact type: a class of ours is entered where the torch class that it extends stands."""

from __future__ import annotations

import sys

__all__ = ["enter_with_opacus"]


def enter_with_opacus(kind: type) -> None:
    """Enter the class in the validators and fixers of Opacus, if that is loaded.

    Batch normalization mixes samples, so a model that holds one is not fit for differential privacy. A validator that
    does not know the class would let it pass without a word.
    """
    opacus = sys.modules.get("opacus.validators.module_validator")
    if opacus is None:
        return
    for table in (opacus.ModuleValidator.VALIDATORS, opacus.ModuleValidator.FIXERS):
        known = next((base for base in kind.__mro__ if base in table), kind)
        if known is not kind:
            table[kind] = table[known]
