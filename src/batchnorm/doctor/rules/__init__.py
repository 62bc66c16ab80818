"""One file for each rule. A file is found because it stands in this folder; others' rules by their entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache

from ...errors import UserError, quote_error
from ..rule import Rule, registered

__all__ = ["ENTRY_POINTS", "all_rules", "chosen_rules", "codes_of", "find_rule"]

# Group of entry points: each names a module that registers rules by the decorator `batchnorm.doctor.rule.rule`.
ENTRY_POINTS = "batchnorm.rules"


@cache
def all_rules() -> tuple[Rule, ...]:
    """Return every rule, by code."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            raise UserError(
                f"the rules of {entry.value} cannot be loaded ({quote_error(error)}), entry point {entry.name}, "
                "update or uninstall that package"
            ) from error
    return registered()


def find_rule(code: str) -> Rule:
    """Return the rule of a code or a name, in capitals or not.

    Raises:
        UserError: no rule has this code.
    """
    rules = {rule.code: rule for rule in all_rules()}
    named = {rule.name.upper(): rule for rule in all_rules()} | rules
    if code.strip().upper() not in named:
        raise UserError(f"no rule {code!r}, page(code={code}), give one of {', '.join(rules)}")
    return named[code.strip().upper()]


def chosen_rules(select: str | Iterable[str] | None, ignore: str | Iterable[str] | None) -> tuple[Rule, ...]:
    """Return the selected rules (None = all) without the ignored ones, by codes, prefixes of codes or names.

    Raises:
        UserError: a code that no rule has.
    """
    wanted = set(codes_of(select, "select")) if select is not None else {rule.code for rule in all_rules()}
    unwanted = set(codes_of(ignore, "ignore")) if ignore is not None else set()
    return tuple(rule for rule in all_rules() if rule.code in wanted - unwanted)


def codes_of(given: str | Iterable[str], parameter: str) -> Iterator[str]:
    """Yield the codes that codes, prefixes of codes and names stand for; `parameter` is for the message.

    Raises:
        UserError: a code or name that no rule has.
    """
    entries = given.split(",") if isinstance(given, str) else given
    for entry in entries:
        prefix = str(entry).strip().upper()
        rules = [(rule.code, rule.name.upper()) for rule in all_rules()]
        found = [code for code, name in rules if prefix == name or (code.startswith(prefix) and len(prefix) > 1)]
        if not found:
            first, last = all_rules()[0].code, all_rules()[-1].code
            raise UserError(f"no rule {entry!r}, diagnose({parameter}=…), give codes of {first}…{last}")
        yield from found
