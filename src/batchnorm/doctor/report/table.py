"""The table for the terminal: the worst findings first, those of one rule together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..diagnosis import Diagnosis, Finding, shown

if TYPE_CHECKING:
    from ..repair import RepairReport

__all__ = ["print_diagnosis", "print_repair"]

_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}
# Number of modules of one finding that are named. The others are only counted; the JSON names them all.
_NAMED = 3


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print the symptom, the findings, the lines to type, unbroken, and what was and was not examined."""
    first = 1 if diagnosis.symptom else 0
    for line in diagnosis.summary()[:first]:
        console.print(line, style="bold", soft_wrap=True)
    if diagnosis.findings:
        console.print(_table(diagnosis))
    else:
        console.print(f"{diagnosis.subject}: no findings in {len(diagnosis.examined)} rules")
    for code, fix in {finding.code: finding.fix for finding in diagnosis.findings}.items():
        console.print(f"fix {code}: {fix}", soft_wrap=True)
    if diagnosis.findings:
        console.print("batchnorm doctor --explain CODE says more about a rule", style="dim")
    for line in diagnosis.summary()[first:]:
        console.print(line, style="red" if line.startswith("could not") else "dim", soft_wrap=True)


def _table(diagnosis: Diagnosis) -> Table:
    table = Table(title=f"{diagnosis.subject}: {_count(diagnosis.findings)}", title_justify="left", show_lines=True)
    for heading in ("rule", "module", "what is wrong", "evidence"):
        table.add_column(heading, overflow="fold")
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in diagnosis.findings:
        groups.setdefault((finding.code, finding.severity), []).append(finding)
    for (code, severity), findings in groups.items():
        first = findings[0]
        names = "\n".join(finding.module or "model" for finding in findings[:_NAMED])
        more = f"\nand {len(findings) - _NAMED} more" if len(findings) > _NAMED else ""
        numbers = "\n".join(f"{key} {shown(value)}" for key, value in first.evidence.items())
        what = Text(first.message)
        what.append(f"\na false alarm if {first.false_alarm}", "dim")
        table.add_row(Text(f"{code} {severity}\n{first.name}", _COLOURS[severity]), names + more, what, numbers)
    return table


def _count(findings: Iterable[Finding]) -> str:
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.severity] = counts.get(finding.severity, 0) + 1
    return ", ".join(f"{n} {severity}{'s' * (n > 1 and severity != 'info')}" for severity, n in counts.items())


def print_repair(report: RepairReport, console: Console) -> None:
    """Print what was changed, what was left, and whether the answers are better for it."""
    table = Table(title="mended", title_justify="left")
    for heading in ("rule", "module", "what", "before", "after", "kind"):
        table.add_column(heading, overflow="fold")
    for change in report.changes:
        kind = "safe" if change.safe else "unsafe"
        table.add_row(change.code, change.module or "model", change.what, change.before, change.after, kind)
    if report.changes:
        console.print(table)
