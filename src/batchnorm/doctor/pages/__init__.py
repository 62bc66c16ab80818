"""The rules' pages in Markdown, CODE.md."""

from __future__ import annotations

from ..rules import find_rule

__all__ = ["page"]


def page(code: str) -> str:
    """Return the page of a rule as Markdown.

    Raises:
        UserError: no rule has this code.
    """
    return find_rule(code).page.read_text(encoding="utf-8")
