"""SARIF 2.1.0, the format in which code-scanning services take findings."""

from __future__ import annotations

from typing import Any

from ..._version import __version__
from ..diagnosis import Diagnosis, Finding
from ..rules import all_rules

__all__ = ["to_sarif"]

_LEVELS = {"info": "note", "warning": "warning", "error": "error"}


def to_sarif(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis as a SARIF log. A module is a logical location, because it stands in no line of a file."""
    rules = all_rules()
    index = {rule.code: position for position, rule in enumerate(rules)}
    driver = {
        "name": "batchnorm doctor",
        "version": __version__,
        "rules": [
            {
                "id": rule.code,
                "name": "".join(part.capitalize() for part in rule.name.split("-")),
                "shortDescription": {"text": rule.summary},
                "help": {"text": f"{rule.fix}. A false alarm if {rule.false_alarm}."},
            }
            for rule in rules
        ],
    }
    run = {
        "tool": {"driver": driver},
        "results": [_result(finding, index) for finding in diagnosis.findings],
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [
                    {"level": "note", "descriptor": {"id": code}, "message": {"text": f"{code} not examined: {reason}"}}
                    for code, reason in diagnosis.not_examined.items()
                ],
            }
        ],
    }
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _result(finding: Finding, index: dict[str, int]) -> dict[str, Any]:
    return {
        "ruleId": finding.code,
        "ruleIndex": index[finding.code],
        "level": _LEVELS[finding.severity],
        "message": {
            "text": f"{finding.module or 'model'}: {finding.message}. Fix: {finding.fix}. "
            f"A false alarm if {finding.false_alarm}."
        },
        "locations": [
            {"logicalLocations": [{"fullyQualifiedName": finding.module or "model", "kind": "member"}]},
        ],
        "properties": {"evidence": finding.as_dict()["evidence"]},
    }
