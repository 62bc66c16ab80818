"""One file for each rule. A file is found because it stands in this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache

from ...errors import UserError
from ..rule import Rule, registered

__all__ = ["all_rules", "chosen_rules", "find_rule"]


@cache
def all_rules() -> tuple[Rule, ...]:
    """Return every rule, by code."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return registered()


def find_rule(code: str) -> Rule:
    """Return the rule of a code, in capitals or not.

    Raises:
        UserError: no rule has this code.
    """
    rules = {rule.code: rule for rule in all_rules()}
    if code.strip().upper() not in rules:
        raise UserError(f"no rule {code!r}, page(code={code}), give one of {', '.join(rules)}")
    return rules[code.strip().upper()]


def chosen_rules(select: str | Iterable[str] | None, ignore: str | Iterable[str] | None) -> tuple[Rule, ...]:
    """Return the selected rules (None = all) without the ignored ones. A prefix stands for all its codes.

    Raises:
        UserError: a code that no rule has.
    """
    wanted = set(_codes(select, "select")) if select is not None else {rule.code for rule in all_rules()}
    unwanted = set(_codes(ignore, "ignore")) if ignore is not None else set()
    return tuple(rule for rule in all_rules() if rule.code in wanted - unwanted)


def _codes(given: str | Iterable[str], parameter: str) -> Iterator[str]:
    entries = given.split(",") if isinstance(given, str) else given
    for entry in entries:
        prefix = str(entry).strip().upper()
        found = [rule.code for rule in all_rules() if rule.code.startswith(prefix) and len(prefix) > 1]
        if not found:
            first, last = all_rules()[0].code, all_rules()[-1].code
            raise UserError(f"no rule {entry!r}, diagnose({parameter}=…), give codes of {first}…{last}")
        yield from found
