"""SARIF 2.1.0, the format in which code-scanning services take findings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from ..._version import __version__
from ..diagnosis import Diagnosis, Finding
from ..rules import all_rules
from .locations import Location

__all__ = ["to_sarif"]

_LEVELS = {"info": "note", "warning": "warning", "error": "error"}


def to_sarif(diagnosis: Diagnosis, locate: Callable[[str], Location | None] = lambda layer: None) -> dict[str, Any]:
    """Return the diagnosis as a SARIF log.

    Args:
        diagnosis: what was found.
        locate: layer → where in the user's sources it is made. A layer is a logical location in any case.
    """
    rules = all_rules()
    index = {rule.code: position for position, rule in enumerate(rules)}
    driver = {
        "name": "batchnorm doctor",
        "version": __version__,
        "rules": [
            {
                "id": rule.code,
                "name": "".join(part.capitalize() for part in rule.name.split("-")),
                "defaultConfiguration": {"level": "warning"},
                "shortDescription": {"text": rule.summary},
                "help": {"text": f"{rule.fix}. A false alarm if {rule.false_alarm}."},
            }
            for rule in rules
        ],
    }
    run = {
        "tool": {"driver": driver},
        "results": [_result(f, index, locate(f.module), diagnosis.subject) for f in diagnosis.findings],
        "invocations": [
            {
                "executionSuccessful": True,
                "toolExecutionNotifications": [
                    {
                        "level": "warning" if code in diagnosis.could_not_look else "note",
                        "associatedRule": {"id": code},
                        "message": {"text": f"{code} not examined: {reason}"},
                    }
                    for code, reason in diagnosis.not_examined.items()
                ],
            }
        ],
    }
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _result(finding: Finding, index: dict[str, int], location: Location | None, subject: str) -> dict[str, Any]:
    place: dict[str, Any] = {"logicalLocations": [{"fullyQualifiedName": finding.module or "model", "kind": "member"}]}
    if location is not None:
        place["physicalLocation"] = {
            "artifactLocation": {"uri": quote(location.path), "uriBaseId": "%SRCROOT%"},
            "region": {"startLine": location.line},
        }
    # What a finding is the same by from run to run: neither its numbers nor the line, which moves.
    same = hashlib.sha256("\0".join((finding.code, subject, finding.module)).encode()).hexdigest()
    return {
        "ruleId": finding.code,
        "ruleIndex": index[finding.code],
        "level": _LEVELS[finding.severity],
        "message": {
            "text": f"{finding.module or 'model'}: {finding.message}. Fix: {finding.fix}. "
            f"A false alarm if {finding.false_alarm}."
        },
        "locations": [place],
        "partialFingerprints": {"ruleAndLayer/v1": same[:32]},
        "properties": {"evidence": finding.as_dict()["evidence"]},
    }
