"""What an examination returns: the findings, the worst first, and what was not examined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from .evidence.comparison import Comparison

__all__ = ["SCHEMA", "SEVERITIES", "Diagnosis", "Finding", "shown"]

# Number of the JSON's form. It grows when a key changes its meaning or goes away.
SCHEMA = 1

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
        symptom: how good the answers are with batch, running and recalibrated statistics; None without batches.
        could_not_look: for each rule that could not decide on something that was given, why. `not_examined` has it too.
    """

    findings: tuple[Finding, ...]
    not_examined: dict[str, str] = field(default_factory=dict)
    examined: tuple[str, ...] = ()
    subject: str = ""
    symptom: Comparison | None = None
    could_not_look: dict[str, str] = field(default_factory=dict)

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
        """1 where a warning or an error was found, else 3 where something given could not be examined, else 0."""
        if self.worst in ("warning", "error"):
            return 1
        return 3 if self.could_not_look else 0

    def without(self, ignored: Mapping[str, set[str]]) -> Diagnosis:
        """Return the diagnosis without the findings of these codes in layers whose names fit the patterns."""

        def kept(finding: Finding) -> bool:
            fits = (fnmatchcase(finding.module, pattern) for pattern, codes in ignored.items() if finding.code in codes)
            return not any(fits)

        return replace(self, findings=tuple(filter(kept, self.findings)))

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis for JSON."""
        return {
            "schema": SCHEMA,
            "subject": self.subject,
            "symptom": self.symptom.as_dict() if self.symptom else None,
            "findings": [finding.as_dict() for finding in self.findings],
            "could_not_look": dict(self.could_not_look),
            "not_examined": dict(self.not_examined),
            "examined": list(self.examined),
            "exit_code": self.exit_code,
        }

    def summary(self) -> list[str]:
        """Return the lines that are always said: the symptom, what could not be looked at, and in two lines what was
        examined and what was not, with the reason."""
        lines = [f"symptom: {self.symptom}"] if self.symptom else []
        lines += [f"could not look: {code}: {reason}" for code, reason in self.could_not_look.items()]
        rest = {code: reason for code, reason in self.not_examined.items() if code not in self.could_not_look}
        lines.append(f"examined: {', '.join(self.examined) or 'nothing'}")
        lines.append("not examined: " + ("; ".join(f"{code}: {reason}" for code, reason in rest.items()) or "nothing"))
        return lines

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings] or ["no findings"]
        first = 1 if self.symptom else 0
        return "\n".join([*self.summary()[:first], *lines, *self.summary()[first:]])


def shown(value: float | int | str) -> str:
    """Return a number of evidence with the digits that matter."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _for_json(value: float | int | str) -> float | int | str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
