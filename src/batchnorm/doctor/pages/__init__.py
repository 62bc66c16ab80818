"""The rules' pages, BNxxx.md, one a code."""

from __future__ import annotations

from importlib.resources import files

__all__ = ["page"]


def page(code: str) -> str:
    """Returns the page of a rule as Markdown.

    Raises:
        UserError: no rule has this code.
    """
    from ...errors import UserError
    from ..rule import all_rules

    codes = [rule.code for rule in all_rules()]
    if code.strip().upper() not in codes:
        raise UserError(f"no rule {code!r}, --explain, give one of {', '.join(codes)}")
    return files(__name__).joinpath(f"{code.strip().upper()}.md").read_text(encoding="utf-8")
