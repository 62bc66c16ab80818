"""What a rule is, and the decorator that registers one. Each rule is one file under `rules/` and one page."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .change import Change, RepairContext
from .diagnosis import Finding
from .evidence.needs import CouldNotLook, Evidence, NotExamined

__all__ = ["CouldNotLook", "Found", "NotExamined", "Repair", "Rule", "registered", "rule"]

Repair = Callable[[RepairContext, Finding], list[Change]]


@dataclass(frozen=True)
class Found:
    """What a rule yields. The rule adds what all its findings have in common."""

    module: str
    message: str
    evidence: dict[str, float | int | str]
    severity: str = "warning"
    fix: str | None = None


Check = Callable[[Evidence], Iterable[Found]]


@dataclass(frozen=True)
class Rule:
    """Everything that is known about one code. The decorator `rule` says what the fields mean."""

    code: str
    name: str
    summary: str
    order: int
    needs: tuple[str, ...]
    wants: tuple[str, ...]
    fix: str
    false_alarm: str
    repair: Repair | None = field(repr=False)
    unsafe: bool
    check: Check = field(repr=False)

    @property
    def page(self) -> Path:
        """The Markdown page: `pages/CODE.md` beside the folder of the rule's file."""
        return Path(inspect.getfile(self.check)).parents[1] / "pages" / f"{self.code}.md"

    def examine(self, evidence: Evidence) -> list[Finding]:
        """Return the findings.

        Raises:
            NotExamined: a need is not met.
        """
        for need in self.needs:
            lacking = evidence.lacks(need)
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
            for found in self.check(evidence)
        ]


_RULES: dict[str, Rule] = {}


def rule(
    code: str,
    name: str,
    *,
    summary: str,
    order: int,
    needs: tuple[str, ...],
    fix: str,
    false_alarm: str,
    wants: tuple[str, ...] = (),
    repair: Repair | None = None,
    unsafe: bool = False,
) -> Callable[[Check], Rule]:
    """Register the function that it decorates as the decision of a rule.

    Args:
        code, name: as a finding shows them.
        summary: the fault in one sentence.
        order: position among findings of one severity, lowest first: wrong answers, then lost signal, then training
            that is not what was meant.
        needs: names that `Evidence.lacks` knows. The rule is not examined where one is missing.
        fix: the line that repairs the fault by hand; a finding may give its own.
        false_alarm: completes "a false alarm if …".
        wants: measurements that cost forward passes and that the rule can decide without: "comparison", "dropout".
        repair: repairs one finding in place and returns what it changed. None: only the user can.
        unsafe: the repair changes how the model trains on, not only what evaluation computes.
    """

    def register(check: Check) -> Rule:
        _RULES[code] = Rule(code, name, summary, order, needs, wants, fix, false_alarm, repair, unsafe, check)
        return _RULES[code]

    return register


def registered() -> tuple[Rule, ...]:
    """Return the rules whose files were imported, by code."""
    return tuple(_RULES[code] for code in sorted(_RULES))
