"""Colors, marks and words that all parts of the report share."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from ..analysis.metric import Metric
from ..training.arms import ARMS
from .evidence import finite

# Okabe and Ito's palette (Color Universal Design, 2008): people with any common color blindness can distinguish it.
# Its black is a gray here, legible on light and on dark paper; its yellow, 1.3 : 1 on white, is darkened.
BASELINE = "#D55E00"
COMPARED = "#0072B2"
BETWEEN = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7F87", "#8A7D00")
# Besides its color, every arm has its own dash and mark.
DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot", "5px 2px 1px 2px", "2px 6px")
MARKS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down", "pentagon")


def arm_words(arm: str) -> str:
    return ARMS[arm].words if arm in ARMS else arm


def arm_color(arms: Sequence[str], arm: str) -> str:
    """Return the arm's color: the first arm is always vermilion and the last always blue, in every report."""
    index = list(arms).index(arm)
    if index == 0:
        return BASELINE
    if index == len(arms) - 1:
        return COMPARED
    return BETWEEN[(index - 1) % len(BETWEEN)]


def arm_dash(arms: Sequence[str], arm: str) -> str:
    """Return the arm's dash: solid for the last arm, which the claims are about, and another one for each other arm."""
    index = list(arms).index(arm)
    return "solid" if index == len(arms) - 1 else DASHES[index % len(DASHES)]


def arm_mark(arms: Sequence[str], arm: str) -> str:
    return MARKS[list(arms).index(arm) % len(MARKS)]


def faded(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def label(text: Any, limit: int = 30) -> str:
    """Return a user's text so that plotly draws it as plain text.

    Plotly reads its own small HTML in every label, `%{…}` in hover texts and `$…$` as TeX; entities disarm all three.
    A long text keeps both ends, since module names differ at their end.
    """
    plain = " ".join(str(text).split())
    if len(plain) > limit:
        plain = f"{plain[: limit // 2]}…{plain[-(limit // 2 - 1) :]}"
    return html.escape(plain).replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;")


def number(value: Any, digits: int = 3) -> str:
    """Return a number to some significant digits with a true minus sign; an em dash for none."""
    known = finite(value)
    if known is None:
        return "—"
    if known == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(known))))
    if abs(known) < 1e-3 or abs(known) >= 1e6:
        mantissa, power = f"{known:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        shown = f"{mantissa}e{int(power)}"
    else:
        shown = f"{known:,.{places}f}"
        shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return shown.replace("-", "−")


def percent(value: Any, places: int = 1) -> str:
    known = finite(value)
    return "—" if known is None else f"{100 * known:.{places}f} %"


def value_words(metric: Metric, value: Any) -> str:
    """Return a value of the metric: a fraction in percent, any other to three digits."""
    return percent(value) if metric.fraction else number(value)


def value_format(metric: Metric) -> str:
    """Return plotly's format of the metric's values on an axis."""
    return ".0%" if metric.fraction else ".3~g"


def ticks(values: Sequence[float]) -> list[str]:
    """Return the shortest labels that are all different and off by under 6 %: 0.0032 is 0.003, but 0.25 stays 0.25."""
    for digits in range(1, 7):
        rounded = [float(f"{value:.{digits - 1}e}") for value in values]
        near = all(abs(r - value) <= 0.06 * abs(value) for r, value in zip(rounded, values, strict=True))
        if near and len(set(rounded)) == len(rounded):
            break
    return [number(value, digits) for value in values]
