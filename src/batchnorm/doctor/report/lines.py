"""A diagnosis in lines: one a finding for people and pipes, GitHub's annotations, and JUnit's XML."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

from ..diagnosis import Diagnosis, Finding
from .locations import Location

__all__ = ["concise", "github", "junit"]

Locate = Callable[[str], Location | None]
_GITHUB = {"info": "notice", "warning": "warning", "error": "error"}


def concise(diagnosis: Diagnosis) -> list[str]:
    """Return the symptom, one line a finding, never wrapped, and what was and was not examined."""
    lines = [
        f"{finding.module or 'model'}: {finding.code} {finding.name} {finding.severity}: {finding.message}. "
        f"Fix: {finding.fix}"
        for finding in diagnosis.findings
    ]
    first = 1 if diagnosis.symptom else 0
    if not lines:
        lines = [f"{diagnosis.subject}: no findings in {len(diagnosis.examined)} rules"]
    return [*diagnosis.summary()[:first], *lines, *diagnosis.summary()[first:]]


def github(diagnosis: Diagnosis, locate: Locate) -> list[str]:
    """Return GitHub's workflow commands, which show as annotations at the lines where the layers are made."""
    return [
        *(_annotation(finding, locate(finding.module)) for finding in diagnosis.findings),
        *(f"::warning title=batchnorm {code}::could not look: {_escaped(reason)}"
          for code, reason in diagnosis.could_not_look.items()),
    ]  # fmt: skip


def _annotation(finding: Finding, location: Location | None) -> str:
    at = f"file={_escaped(location.path, ',:')},line={location.line}," if location else ""
    text = f"{finding.module or 'model'}: {finding.message}. Fix: {finding.fix}"
    return f"::{_GITHUB[finding.severity]} {at}title={finding.code} {finding.name}::{_escaped(text)}"


def _escaped(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


def junit(diagnosis: Diagnosis) -> str:
    """Return JUnit's XML: a test case a rule, failed with its findings or skipped where it was not examined."""
    cases = [*diagnosis.examined, *diagnosis.not_examined]
    failing = {finding.code for finding in diagnosis.findings if finding.severity != "info"}
    suite = ElementTree.Element(
        "testsuite",
        name="batchnorm doctor",
        tests=str(len(cases)),
        failures=str(len(failing)),
        errors=str(len(diagnosis.could_not_look)),
        skipped=str(len(diagnosis.not_examined) - len(diagnosis.could_not_look)),
    )
    for code in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=diagnosis.subject, name=code)
        found = [finding for finding in diagnosis.findings if finding.code == code]
        if code in failing:
            failure = ElementTree.SubElement(case, "failure", type=found[0].severity, message=found[0].message)
            failure.text = "\n".join(str(finding) for finding in found)
        elif code in diagnosis.could_not_look:
            ElementTree.SubElement(case, "error", message=diagnosis.could_not_look[code])
        elif code in diagnosis.not_examined:
            ElementTree.SubElement(case, "skipped", message=diagnosis.not_examined[code])
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode")
