"""What an examination returns: the findings, the worst first, and what was not examined."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "shown"]

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One fault in one place.

    Attributes:
        code, name: those of the rule.
        severity: "info", "warning" or "error".
        module: dotted name; "" is the whole model.
        message: what is wrong, in one sentence.
        evidence: the numbers that show it.
        fix: the line that repairs it.
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
        """Return the finding for JSON. NaN and infinity become text, because JSON has neither."""
        return {**vars(self), "evidence": {key: _for_json(value) for key, value in self.evidence.items()}}

    def __str__(self) -> str:
        numbers = ", ".join(f"{key} {shown(value)}" for key, value in self.evidence.items())
        return f"{self.code} {self.severity} {self.module or 'model'}: {self.message} ({numbers}); {self.fix}"


@dataclass(frozen=True)
class Diagnosis:
    """What an examination found.

    Attributes:
        findings: the worst first.
        not_examined: for the code of each rule that could not decide, what it lacked.
        examined: the codes of the rules that decided.
        subject: what was examined, in words.
    """

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
        """The worst severity; None without findings."""
        found = {finding.severity for finding in self.findings}
        return next((severity for severity in SEVERITIES if severity in found), None)

    @property
    def exit_code(self) -> int:
        """1 where a warning or an error was found, else 0."""
        return int(self.worst in ("warning", "error"))

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis for JSON."""
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


def shown(value: float | int | str) -> str:
    """Return a number of evidence with the digits that matter."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _for_json(value: float | int | str) -> float | int | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
