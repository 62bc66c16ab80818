"""What a rule is, and the registry of all of them: one small file each under `rules/`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache

from ..errors import UserError
from .diagnosis import Finding
from .facts.facts import Facts, NotExamined

__all__ = ["Found", "NotExamined", "Rule", "all_rules", "chosen", "rule"]


@dataclass(frozen=True)
class Found:
    """What a rule yields; the registry adds what all its findings have in common."""

    module: str
    message: str
    evidence: dict[str, float | int | str]
    severity: str = "warning"
    fix: str | None = None


@dataclass(frozen=True)
class Rule:
    """`needs` are names that `Facts.lacks` knows; `false_alarm` completes "a false alarm if …"."""

    code: str
    name: str
    summary: str
    needs: tuple[str, ...]
    fix: str
    false_alarm: str
    check: Callable[[Facts], Iterable[Found]] = field(repr=False)

    def examine(self, facts: Facts) -> list[Finding]:
        """Returns the findings.

        Raises:
            NotExamined: a need is not met.
        """
        for need in self.needs:
            lacking = facts.lacks(need)
            if lacking is not None:
                raise NotExamined(lacking)
        return [
            Finding(
                code=self.code,
                name=self.name,
                severity=found.severity,
                module=found.module,
                message=found.message,
                evidence=found.evidence,
                fix=found.fix or self.fix,
                false_alarm=self.false_alarm,
            )
            for found in self.check(facts)
        ]


_RULES: dict[str, Rule] = {}


def rule(
    code: str, name: str, *, summary: str, needs: tuple[str, ...], fix: str, false_alarm: str
) -> Callable[[Callable[[Facts], Iterable[Found]]], Rule]:
    """Registers the function that it decorates as the rule's decision."""

    def register(check: Callable[[Facts], Iterable[Found]]) -> Rule:
        _RULES[code] = Rule(code, name, summary, needs, fix, false_alarm, check)
        return _RULES[code]

    return register


@cache
def all_rules() -> tuple[Rule, ...]:
    """Returns every rule, by code."""
    from . import rules

    for module in pkgutil.iter_modules(rules.__path__):
        importlib.import_module(f"{rules.__name__}.{module.name}")
    return tuple(_RULES[code] for code in sorted(_RULES))


def chosen(select: str | Iterable[str] | None, ignore: str | Iterable[str] | None) -> tuple[Rule, ...]:
    """Returns the selected rules (None = all) without the ignored ones. A prefix stands for all its codes: BN2.

    Raises:
        UserError: a code that no rule has.
    """
    wanted = set(_codes(select, "select")) if select is not None else {rule.code for rule in all_rules()}
    unwanted = set(_codes(ignore, "ignore")) if ignore is not None else set()
    return tuple(rule for rule in all_rules() if rule.code in wanted - unwanted)


def _codes(given: str | Iterable[str], option: str) -> Iterator[str]:
    entries = given.split(",") if isinstance(given, str) else given
    for entry in entries:
        prefix = str(entry).strip().upper()
        found = [rule.code for rule in all_rules() if rule.code.startswith(prefix) and len(prefix) > 1]
        if not found:
            raise UserError(f"no rule {entry!r}, {option}, give codes of {all_rules()[0].code}…{all_rules()[-1].code}")
        yield from found
