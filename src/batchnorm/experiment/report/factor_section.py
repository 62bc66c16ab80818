"""The section on batch sizes and optimizers: figures and tables of the summary's `factors` entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cards import SYMBOLS, bound, measured
from .evidence import Curve, StudyEvidence, finite
from .figures import Figure, Plotly, axis, curve_traces, layout, means_trace
from .style import arm_color, label, number, percent
from .tables import Table

TITLES = {"batch_size": "Batch size", "optimizer": "Optimizer"}
# The unit of each panel's horizontal axis, and the title of the axis.
UNITS = {"updates": "updates", "samples": "samples seen", "seconds": "seconds of updates"}
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Panels:
    """One arm's curves against updates, against samples and against time."""

    arm: str
    figures: list[Figure]


@dataclass(frozen=True)
class Part:
    """One factor's part of the section."""

    factor: str
    title: str
    overview: list[Figure]
    impossible: list[str]
    panels: list[Panels]
    tables: list[Table]

    @property
    def figures(self) -> list[Figure]:
        return self.overview + [figure for panels in self.panels for figure in panels.figures]


def parts(evidence: StudyEvidence) -> list[Part]:
    """Return one part a factor; none for a study without factors."""
    factors = evidence.summary.get("factors") or {}
    found = []
    for factor in factors.get("levels") or {}:
        entries = [entry for entry in factors["cells"] if entry["factor"] == factor]
        overview = _overview(evidence, factor, entries)
        panels = [Panels(arm, _panels(evidence, factor, arm, entries)) for arm in evidence.arms]
        found.append(Part(
            factor, TITLES[factor], [overview] if overview else [], impossible_words(entries),
            [panel for panel in panels if panel.figures],
            [table for table in (cell_table(factor, entries), claim_table(factors, factor)) if table],
        ))  # fmt: skip
    return found


def impossible_words(entries: Sequence[Entry]) -> list[str]:
    """Return a sentence for each level that some arms cannot be trained at."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        if why := entry.get("impossible"):
            found.setdefault((TITLES[entry["factor"]], str(entry["level"]), str(why)), []).append(str(entry["arm"]))
    return [
        f"{title} {level} is impossible for {', '.join(arms)}: {why}." for (title, level, why), arms in found.items()
    ]


def cell_tables(factors: Mapping[str, Any]) -> list[Table]:
    """Return, for each factor, what every arm attains at every level and what it takes to the target."""
    tables = [
        cell_table(factor, [e for e in factors["cells"] if e["factor"] == factor]) for factor in factors["levels"]
    ]
    return [table for table in tables if table]


def cell_table(factor: str, entries: Sequence[Entry]) -> Table | None:
    head = ["Arm", TITLES[factor], "Rates", "Test accuracy", "Reached", "Updates", "Samples", "Seconds"]
    caption = (
        f"{TITLES[factor]}: the arm's best and its fastest rate (* is an end of the rates tried); test accuracy at the "
        "best, mean ± half its 95 % interval; how many runs reached the target at the fastest, and what the median run "
        "took to it."
    )
    return Table(caption, head, [_cell_row(entry) for entry in entries], lead=2) if entries else None


def _cell_row(entry: Entry) -> list[str]:
    where = [str(entry["arm"]), str(entry["level"])]
    if entry.get("impossible"):
        return [*where, "—", "impossible", "—", "—", "—", "—"]
    half = finite(entry.get("test_half_width"))
    accuracy = percent(entry["test_accuracy"]) + ("" if half is None else f" ± {100 * half:.1f}")
    if entry.get("diverged"):
        accuracy += f" ({entry['diverged']} diverged)"
    reached = f"{entry['reached']} of {entry['runs_at_fastest']}"
    taken = [number(entry.get(f"{unit}_to_target")) for unit in UNITS]
    rates = dict.fromkeys(number(lr) + "*" * (lr in entry["grid"]) for lr in (entry["lr"], entry["fastest_lr"]))
    return [*where, ", ".join(rates), accuracy, reached, *taken]


def claim_table(factors: Mapping[str, Any], factor: str) -> Table | None:
    """Return the table that compares each arm at each level with the same arm at the study's own level."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    against = ""
    for claim in (factors.get("claims") or {}).values():
        if claim["factor"] == factor and "against_level" in claim:
            against = claim["against_level"]
            rows.setdefault((claim["arm"], claim["level"]), {})[claim["measure"]] = _claim_words(claim)
    head = ["Arm", TITLES[factor], "Test accuracy, points", *(f"{unit.capitalize()}, times" for unit in UNITS)]
    caption = (
        f"Against {TITLES[factor].lower()} {against}, each with its 95 % interval: the change in test accuracy, and "
        "how many times the updates, samples and seconds the target takes. ▲ better, ▼ worse, = no difference shown, "
        "○ not measurable. No correction is made for how many there are."
    )
    measures = ("accuracy", *UNITS)
    lines = [[arm, level, *(own.get(name, "—") for name in measures)] for (arm, level), own in sorted_as(factors, rows)]
    return Table(caption, head, lines, lead=2) if lines else None


def sorted_as(factors: Mapping[str, Any], rows: dict[tuple[str, str], Any]) -> list[tuple[tuple[str, str], Any]]:
    """Return the rows grouped by arm, and within an arm in the order of the levels."""
    order = list(dict.fromkeys((entry["arm"], entry["level"]) for entry in factors["cells"]))
    arms = list(dict.fromkeys(arm for arm, _ in order))
    return sorted(rows.items(), key=lambda item: (arms.index(item[0][0]), order.index(item[0])))


def _claim_words(claim: Mapping[str, Any]) -> str:
    if not measured(claim):
        return "○"
    estimate, low, high = (finite(claim.get(key)) for key in ("estimate", "ci_low", "ci_high"))
    return f"{SYMBOLS.get(str(claim['verdict']), '=')} {number(estimate, 2)} ({bound(low)} to {bound(high)})"


def _overview(evidence: StudyEvidence, factor: str, entries: Sequence[Entry]) -> Figure | None:
    """Return the figure of test accuracy over the levels; a cross marks where an arm cannot be trained."""
    levels = list(dict.fromkeys(entry["level"] for entry in entries))
    known = [entry for entry in entries if finite(entry.get("test_accuracy")) is not None]
    if not known:
        return None
    reach = min(0.3, 0.06 * (len(evidence.arms) - 1))
    floor = min(e["test_accuracy"] - (e.get("test_half_width") or 0.0) for e in known)
    top = max(e["test_accuracy"] for e in known)
    low = max(0.0, max(floor, min(e["test_accuracy"] for e in known) - 0.1) - 0.06)
    data = []
    for offset, arm in zip(np.linspace(-reach, reach, len(evidence.arms)), evidence.arms, strict=True):
        own = [entry for entry in entries if entry["arm"] == arm]
        data += _overview_traces(evidence, own, levels, float(offset), low + 0.015)
    x = axis(
        TITLES[factor].lower(), tickvals=list(range(len(levels))), ticktext=[label(level) for level in levels],
        range=[-0.5, len(levels) - 0.5],
    )  # fmt: skip
    y = axis("test accuracy", tickformat=".0%", range=[low, min(1.0, top + 0.02)])
    alt = f"Test accuracy over {TITLES[factor].lower()}. " + " ".join(
        f"{e['arm']} at {e['level']}: {'impossible' if e.get('impossible') else percent(e.get('test_accuracy'))}."
        for e in entries
    )
    return Figure(f"{factor}_overview", data, layout(x, y, showlegend=True), 400, alt)


def _overview_traces(
    evidence: StudyEvidence, own: Sequence[Entry], levels: Sequence[str], offset: float, foot: float
) -> list[Plotly]:
    arm = str(own[0]["arm"])
    color, name = arm_color(evidence.arms, arm), label(arm)
    trained = [entry for entry in own if finite(entry.get("test_accuracy")) is not None]
    lost = [entry for entry in own if entry.get("impossible")]
    mean = means_trace(
        evidence.arms,
        arm,
        [levels.index(entry["level"]) + offset for entry in trained],
        [entry["test_accuracy"] for entry in trained],
        [entry.get("test_half_width") for entry in trained],
        [label(entry["level"]) for entry in trained],
    )
    cross = {
        "type": "scatter", "mode": "markers", "showlegend": False, "legendgroup": name,
        "x": [levels.index(entry["level"]) + offset for entry in lost], "y": [foot] * len(lost),
        "marker": {"size": 10, "symbol": "x-thin", "line": {"width": 2.4, "color": color}},
        "hovertemplate": "impossible<extra>" + name + "</extra>",
    }  # fmt: skip
    return [mean, cross] if lost else [mean]


def _panels(evidence: StudyEvidence, factor: str, arm: str, entries: Sequence[Entry]) -> list[Figure]:
    """Return the figures of one arm's median curve at every level, one a unit; the band holds every seed."""
    levels = [_short(level) for level in dict.fromkeys(entry["level"] for entry in entries)]
    curves: list[tuple[Entry, Curve]] = []
    for entry in (entry for entry in entries if entry["arm"] == arm and not entry.get("impossible")):
        setting = {"lr": entry["fastest_lr"], "weight_decay": entry["weight_decay"], "dropout": 0.0}
        curve = evidence.curve_of(_short(entry["level"]), evidence.measured_at(entry, arm, **setting))
        if curve:
            curves.append((entry, curve))
    index = evidence.arms.index(arm)
    figures = [_panel(f"{factor}_{index}_{unit}", unit, arm, levels, curves) for unit in UNITS]
    return [figure for figure in figures if figure]


def _short(level: object) -> str:
    """Return "full" for "full (1079)", because the legend of a panel is narrow."""
    return str(level).partition(" ")[0]


def _panel(
    name: str, unit: str, arm: str, levels: Sequence[str], curves: Sequence[tuple[Entry, Curve]]
) -> Figure | None:
    worth = {"updates": lambda _: 1.0, "samples": lambda e: e["batch"], "seconds": lambda e: e["seconds_per_update"]}
    data: list[Plotly] = []
    ends, words = [], []
    for entry, curve in curves:
        if (price := finite(worth[unit](entry))) is None:
            continue
        data += curve_traces(levels, curve, price)
        ends += [curve.steps[0] * price, curve.steps[-1] * price]
        words.append(f"{curve.arm} ends at {percent(curve.median[-1])} after {number(curve.steps[-1] * price)}.")
    if not data:
        return None
    limits = [float(np.log10(end)) for end in (min(ends), max(ends))]
    x = axis(f"{UNITS[unit]} (log scale)", type="log", dtick=1, range=[limits[0] - 0.03, limits[1] + 0.03])
    drawn = layout(x, axis("validation accuracy", tickformat=".0%", range=[0, 1]), showlegend=True)
    drawn["legend"]["font"]["size"] = 11
    alt = f"Validation accuracy of {arm} against {UNITS[unit]}. " + " ".join(words)
    return Figure(name, data, drawn, 330, alt, f"{arm}: against {unit}")
