"""The headline, and a card for each claim: question, verdict as word and symbol, numbers, a plot of the interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .evidence import StudyEvidence, finite
from .style import arm_words, number

Claim = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """How the report speaks of one claim; `sign` is +1 where a larger estimate is the better one."""

    asks: str
    better: str
    worse: str
    subject: str
    sign: int


QUESTIONS = {
    "convergence": Question("Does it learn faster?", "learns faster", "learns more slowly", "learning speed", +1),
    "learning_rate": Question(
        "Does it tolerate more learning rates?", "tolerates more learning rates", "tolerates fewer learning rates",
        "tolerance of learning rates", +1,
    ),
    "weight_decay": Question(
        "Does it depend less on weight decay?", "depends less on weight decay", "depends more on weight decay",
        "dependence on weight decay", -1,
    ),
    "dropout": Question(
        "Does it depend less on dropout?", "depends less on dropout", "depends more on dropout",
        "dependence on dropout", -1,
    ),
    "generalization": Question(
        "Does it generalize better?", "generalizes better", "generalizes worse", "generalization", +1
    ),
    "drift": Question(
        "Do its activations stay in range?", "keeps its activations steadier", "lets its activations wander more",
        "drift of activations", -1,
    ),
}  # fmt: skip
SYMBOLS = {"better": "▲", "worse": "▼", "no difference": "=", "not measurable": "○"}


@dataclass(frozen=True)
class Card:
    name: str
    asks: str
    verdict: str
    symbol: str
    kind: str
    text: str
    footnote: str
    plot: Markup | None


def cards(summary: Mapping[str, Any]) -> list[Card]:
    """Return one card a claim, in the order of the summary; a claim under a new name gets a card too."""
    return [_card(str(name), claim) for name, claim in (summary.get("claims") or {}).items()]


def measured(claim: Claim) -> bool:
    """Return whether the claim says anything: an estimate, or at least one end of an interval."""
    return any(finite(claim.get(key)) is not None for key in ("estimate", "ci_low", "ci_high"))


def _card(name: str, claim: Claim) -> Card:
    question = QUESTIONS.get(name) or Question(name, "", "", name, +1)
    verdict = str(claim.get("verdict")) if measured(claim) else "not measurable"
    kind, symbol = verdict.replace(" ", "-"), SYMBOLS.get(verdict, "=")
    text = str(claim.get("reason") or claim.get("text") or "no figure was given")
    return Card(
        name, question.asks, verdict, symbol, kind, text, _footnote(claim),
        interval_plot(claim, question.sign) if measured(claim) else None,
    )  # fmt: skip


def _footnote(claim: Claim) -> str:
    """Return the number of seeds, and of runs that are known only to lie beyond a limit (the text says which)."""
    parts = []
    if finite(claim.get("n")):
        parts.append(f"n = {number(claim['n'])} seeds an arm")
    if censored := finite(claim.get("censored")):
        parts.append(f"{number(censored)} censored")
    return ", ".join(parts)


def headline(evidence: StudyEvidence) -> str:
    """Return the study's answer as one sentence."""
    compared, baseline = (str(evidence.summary.get(key, "")) for key in ("compared", "baseline"))
    if compared == baseline or len(evidence.arms) < 2:
        return f"One arm was run ({arm_words(compared or 'none')}), so there is nothing to compare it with."
    claims = evidence.summary.get("claims") or {}
    found = [(q, str(c.get("verdict"))) for name, c in claims.items() if measured(c) and (q := QUESTIONS.get(name))]
    good = [question.better for question, verdict in found if verdict == "better"]
    bad = [question.worse for question, verdict in found if verdict == "worse"]
    if not found:
        return f"This study could not compare {arm_words(compared)} with {arm_words(baseline)}."
    subject = f"With {arm_words(compared)} this network"
    if not good and not bad:
        return f"{subject} shows no measurable difference from {arm_words(baseline)}."
    if good and bad:
        return f"{subject} {_listed(good)}, but {_listed(bad)}."
    return f"{subject} {_listed(good or bad)}."


def remainder(evidence: StudyEvidence) -> list[str]:
    """Return what the headline leaves out: where nothing was found, and where nothing could be measured."""
    claims = evidence.summary.get("claims") or {}
    known = [(QUESTIONS[name].subject, claim) for name, claim in claims.items() if name in QUESTIONS]
    same = [s for s, c in known if measured(c) and c.get("verdict") not in ("better", "worse")]
    blank = [subject for subject, claim in known if not measured(claim)]
    said = []
    if same and len(same) < len(known):
        said.append(f"No difference was shown in {_listed(same)}.")
    if blank and len(blank) < len(known):
        said.append(f"Not measurable here: {', '.join(blank)}.")
    return said


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# Sizes of the small plot: the bar lies between EDGE and WIDTH - EDGE.
WIDTH, HEIGHT, EDGE, BAR = 300, 74, 26, 34


def interval_plot(claim: Claim, sign: int) -> Markup:
    """Return the interval against the value of no effect as a small SVG; an open end is drawn as an arrow."""
    null = finite(claim.get("null")) or 0.0
    estimate, low, high = (finite(claim.get(key)) for key in ("estimate", "ci_low", "ci_high"))
    if null == 1.0 and low is not None and low <= 0:
        low = None  # 0 is no lower bound of a ratio
    place = _scale([null, *(v for v in (estimate, low, high) if v is not None)], ratio=null == 1.0)
    left = EDGE / 2 if low is None else place(low)
    right = WIDTH - EDGE / 2 if high is None else place(high)
    good = WIDTH - 4 if sign > 0 else 4
    parts = [
        _line("null", place(null), 14, place(null), HEIGHT - 20),
        _text("soft", place(null), 9, f"no effect ({number(null)})", _anchor(place(null))),
        _line("bar", left, BAR, right, BAR),
        _end(left, low, -1), _end(right, high, +1),
        _text("soft", good, HEIGHT - 3, "better →" if sign > 0 else "← better", "end" if sign > 0 else "start"),
    ]  # fmt: skip
    parts += _ends(left, right, low, high)
    if estimate is not None:
        parts.append(Markup('<circle class="dot" cx="{:.1f}" cy="{}" r="5"/>').format(place(estimate), BAR))
    said = f"Estimate {number(estimate)}, 95 % interval {bound(low)} to {bound(high)}, no effect at {number(null)}"
    svg = Markup('<svg class="interval" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return svg.format(WIDTH, HEIGHT, said, Markup("").join(parts))


def bound(value: float | None) -> str:
    """Return an end of an interval in words."""
    return "open" if value is None else number(value, 2)


def _scale(values: list[float], ratio: bool) -> Any:
    """Return the function from a value to its horizontal position.

    It is logarithmic for a ratio, so that 2 and 1/2 are equally far from 1.
    """
    log = ratio and min(values) > 0
    shown = [math.log(v) for v in values] if log else values
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    inner = WIDTH - 2 * EDGE - 20

    def place(value: float) -> float:
        return EDGE + 10 + inner * ((math.log(value) if log else value) - low) / span

    return place


def _anchor(x: float) -> str:
    return "start" if x < 70 else "end" if x > WIDTH - 70 else "middle"


def _ends(left: float, right: float, low: float | None, high: float | None) -> list[Markup]:
    """Return the bounds as texts below the ends of the bar, or as one text where two would touch."""
    if right - left < 44:
        return [_text("num", (left + right) / 2, BAR + 20, f"{bound(low)} – {bound(high)}", _anchor(left))]
    ends = ((left, low), (right, high))
    return [_text("num", x, BAR + 20, bound(value), "middle") for x, value in ends if value is not None]


def _end(x: float, value: float | None, side: int) -> Markup:
    if value is not None:
        return _line("bar", x, BAR - 6, x, BAR + 6)
    tip, back = x + 4 * side, x - 6 * side
    return Markup('<path class="bar" d="M{:.1f} {} L{:.1f} {} L{:.1f} {}" fill="none"/>').format(
        back, BAR - 6, tip, BAR, back, BAR + 6
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(kind: str, x: float, y: float, words: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)
