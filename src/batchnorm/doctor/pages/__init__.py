"""The rules' pages in Markdown, CODE.md."""

from __future__ import annotations

from ..rules import find_rule

__all__ = ["page"]


def page(code: str) -> str:
    """Return the page of a rule as Markdown.

    Raises:
        UserError: no rule has this code.
    """
    rule = find_rule(code)
    if not rule.page.is_file():  # another package's rule
        return f"# {rule.code} {rule.name}\n\n{rule.summary}\n\nFix: {rule.fix}. False alarm: if {rule.false_alarm}.\n"
    return rule.page.read_text(encoding="utf-8")
