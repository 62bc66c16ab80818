"""What an examination returns: findings, ordered by what hurts most, and what was not examined."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SEVERITIES", "Diagnosis", "Finding"]

SEVERITIES = ("error", "warning", "info")
# Among findings of one severity: wrong answers first, then lost signal, then training that is not what was meant.
_HURTS = (
    "BN107", "BN106", "BN401", "BN202", "BN108", "BN304", "BN205", "BN207", "BN206", "BN201", "BN105", "BN110",
    "BN103", "BN109", "BN102", "BN303", "BN301", "BN302", "BN204", "BN203", "BN112", "BN101", "BN104", "BN402",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One fault in one place.

    Attributes:
        code, name: of the rule, as BN202 and train-eval-gap.
        severity: "info", "warning" or "error".
        module: dotted name; "" is the whole model.
        message: what is wrong, in one sentence.
        evidence: the numbers it rests on.
        fix: the one line that mends it.
        false_alarm: what would have to be true for this to be no fault.
    """

    code: str
    name: str
    severity: str
    module: str
    message: str
    evidence: dict[str, float | int | str]
    fix: str
    false_alarm: str

    def as_dict(self) -> dict[str, Any]:
        """Returns the finding for JSON, which has no NaN and no infinity: these become text."""
        return {
            "code": self.code,
            "name": self.name,
            "severity": self.severity,
            "module": self.module,
            "message": self.message,
            "evidence": {key: _for_json(value) for key, value in self.evidence.items()},
            "fix": self.fix,
            "false_alarm": self.false_alarm,
        }

    def __str__(self) -> str:
        numbers = ", ".join(f"{key} {shown(value)}" for key, value in self.evidence.items())
        return f"{self.code} {self.severity} {self.module or 'model'}: {self.message} ({numbers}); {self.fix}"


@dataclass(frozen=True)
class Diagnosis:
    """`findings`, the worst first; `not_examined`: for each rule that could not decide, what it lacked."""

    findings: tuple[Finding, ...]
    not_examined: dict[str, str] = field(default_factory=dict)
    examined: tuple[str, ...] = ()
    subject: str = ""

    @property
    def codes(self) -> set[str]:
        """The codes that were found."""
        return {finding.code for finding in self.findings}

    @property
    def worst(self) -> str | None:
        """The worst severity, None without findings."""
        found = {finding.severity for finding in self.findings}
        return next((severity for severity in SEVERITIES if severity in found), None)

    @property
    def exit_code(self) -> int:
        """1 for a finding of warning or error, else 0."""
        return int(self.worst in ("warning", "error"))

    def as_dict(self) -> dict[str, Any]:
        """Returns the diagnosis for JSON."""
        return {
            "subject": self.subject,
            "findings": [finding.as_dict() for finding in self.findings],
            "not_examined": dict(self.not_examined),
            "examined": list(self.examined),
            "exit_code": self.exit_code,
        }

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["no findings"]
        if self.not_examined:
            lines.append("not examined:")
            lines += [f"  {code}: {reason}" for code, reason in self.not_examined.items()]
        return "\n".join(lines)


def by_harm(finding: Finding) -> tuple[int, int, str]:
    """Sorts the worst first."""
    return SEVERITIES.index(finding.severity), _HURTS.index(finding.code), finding.module


def shown(value: float | int | str) -> str:
    """A number of evidence with the digits that matter."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _for_json(value: float | int | str) -> float | int | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
