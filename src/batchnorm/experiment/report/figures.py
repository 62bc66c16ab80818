"""The report's figures as plotly's own JSON, built as plain dictionaries.

A color that depends on light or dark paper is written as the name of a CSS variable ("--ink"); report.js puts its
value in. Every text that a user may have written goes through `style.label`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.metric import Metric
from .evidence import Curve, GridCell, StudyEvidence
from .style import arm_color, arm_dash, arm_mark, faded, label, number, ticks, value_format, value_words

Plotly = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One drawing: its name in the page, what plotly draws, its height in pixels, its description in words."""

    name: str
    data: list[Plotly]
    layout: Plotly
    height: int
    alt: str
    title: str = ""

    def to_json(self) -> Plotly:
        return {"data": self.data, "layout": self.layout}


def axis(title: str, **more: Any) -> Plotly:
    return {
        "title": {"text": title, "standoff": 10, "font": {"size": 12, "color": "--soft"}},
        "gridcolor": "--grid", "linecolor": "--line", "zerolinecolor": "--line", "tickcolor": "--line",
        "tickfont": {"size": 12, "color": "--soft"}, "automargin": True, "showline": True, "zeroline": False, **more,
    }  # fmt: skip


def layout(x: Plotly, y: Plotly, **more: Any) -> Plotly:
    plain = {
        "font": {"size": 13, "color": "--ink"}, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 44, "r": 14, "t": 12, "b": 44}, "hovermode": "closest",
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--ink", "size": 12}},
        "legend": {
            "orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)", "font": {"size": 13, "color": "--ink"},
        },
        "xaxis": x, "yaxis": y, "showlegend": False,
        "modebar": {"bgcolor": "--paper", "color": "--soft", "activecolor": "--ink"},
    }  # fmt: skip
    return {**plain, **more}


def value_axis(evidence: StudyEvidence, **more: Any) -> Plotly:
    return axis(f"validation {label(evidence.metric.name)}", tickformat=value_format(evidence.metric), **more)


def step_axis(steps: Sequence[int]) -> Plotly:
    last = np.log10(max(steps)) if steps else 1.0
    return axis("training step (log scale)", type="log", dtick=1, range=[-0.03, last + 0.03], tickformat=",d")


def accuracy(evidence: StudyEvidence) -> Figure | None:
    """Return the figure of accuracy against steps, each arm at its fastest rate: the median and a band of all seeds."""
    curves = [curve for arm in evidence.arms if (curve := evidence.curve(arm))]
    if not curves:
        return None
    hover = ".1%" if evidence.metric.fraction else ".3~g"
    data = [trace for curve in curves for trace in curve_traces(evidence.arms, curve, hover=hover)]
    x = step_axis([step for curve in curves for step in curve.steps])
    drawn = layout(x, value_axis(evidence), showlegend=True, hovermode="x unified")
    if evidence.target is not None:
        drawn["shapes"] = [rule(evidence.target)]
        text = f"target {value_words(evidence.metric, evidence.target)}"
        drawn["annotations"] = [note(text, xref="paper", x=0.005, xanchor="left", y=evidence.target, yanchor="bottom")]
        data += [mark for curve in curves for mark in _crossing(evidence, curve, evidence.target)]
    alt = f"Validation {evidence.metric.name} against training steps. " + " ".join(
        _curve_words(evidence, c) for c in curves
    )
    return Figure("accuracy", data, drawn, 420, alt)


def curve_traces(names: Sequence[str], curve: Curve, unit: float = 1.0, hover: str = ".1%") -> list[Plotly]:
    """Return the band and the line of one curve; a step is `unit` long, `hover` is the format of values."""
    color, name = arm_color(names, curve.arm), label(curve.arm)
    x = [step * unit for step in curve.steps]
    line = {
        "type": "scatter", "mode": "lines", "x": x, "y": curve.median, "name": name, "legendgroup": name,
        "line": {"color": color, "width": 2.6, "dash": arm_dash(names, curve.arm)},
        "hovertemplate": "%{y:" + hover + "}<extra>" + name + "</extra>",
    }  # fmt: skip
    return [band(x, curve.low, curve.high, color, showlegend=False, legendgroup=name), line]


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, **more: Any) -> Plotly:
    """Return the area between two curves."""
    return {
        "type": "scatter", "mode": "lines", "x": [*x, *x[::-1]], "y": [*high, *low[::-1]], "fill": "toself",
        "fillcolor": faded(color, 0.2), "line": {"width": 0}, "hoverinfo": "skip", **more,
    }  # fmt: skip


def _crossing(evidence: StudyEvidence, curve: Curve, target: float) -> list[Plotly]:
    """Return a mark where the median run reaches the target, where more than half of the runs reach it at all."""
    if len(curve.to_target) * 2 <= curve.seeds:
        return []
    missing = [float("inf")] * (curve.seeds - len(curve.to_target))
    step = float(np.median(curve.to_target + missing))
    if not np.isfinite(step) or step <= 0:
        return []
    return [{
        "type": "scatter", "mode": "markers", "x": [step], "y": [target], "showlegend": False,
        "legendgroup": label(curve.arm), "cliponaxis": False,
        "marker": {
            "size": 12, "symbol": arm_mark(evidence.arms, curve.arm), "color": arm_color(evidence.arms, curve.arm),
            "line": {"width": 1.5, "color": "--card"},
        },
        "hovertemplate": "reaches the target at step %{x:,.0f}<extra>" + label(curve.arm) + "</extra>",
    }]  # fmt: skip


def _curve_words(evidence: StudyEvidence, curve: Curve) -> str:
    reached = ""
    if evidence.target is not None:
        reached = f"; {len(curve.to_target)} of {curve.seeds} runs reach the target"
        if curve.to_target:
            reached += f", those at {number(np.median(curve.to_target))} steps in the middle"
    return f"{curve.arm} ends at {value_words(evidence.metric, curve.median[-1])}{reached}."


def rule(y: float) -> Plotly:
    """Return a dotted line across the whole figure."""
    line = {"color": "--soft", "width": 1.2, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def note(text: str, **more: Any) -> Plotly:
    return {"text": text, "showarrow": False, "font": {"size": 12, "color": "--soft"}, **more}


def rates(evidence: StudyEvidence) -> Figure | None:
    """Return the heat map of arms and learning rates.

    The name of an arm stands above its row and not beside it, because a phone's screen is narrow.
    """
    table = {arm: evidence.cells(arm, "lr") for arm in evidence.arms}
    grid = sorted({cell.value for cells in table.values() for cell in cells})
    if not grid:
        return None
    rows: list[list[float | None]] = []
    texts: list[list[str]] = []
    hovers: list[list[str]] = []
    edges, notes = [0.0], []
    for arm, cells in table.items():
        known = {cell.value: cell for cell in cells}
        best = best_mean(evidence.metric, cells)
        empty: list[Any] = [None] * len(grid)
        rows += [empty, [known[v].mean if v in known else None for v in grid]]
        texts += [
            [""] * len(grid),
            [_heat_text(evidence.metric, known.get(v), best, evidence.setting(arm, "best_lr")) for v in grid],
        ]
        hovers += [[""] * len(grid), [_heat_words(evidence.metric, arm, known.get(v), v) for v in grid]]
        notes.append(note(
            label(arm), xref="paper", x=0, xanchor="left", y=edges[-1] - 0.24, yanchor="middle",
            font={"size": 13, "color": "--ink"},
        ))  # fmt: skip
        edges += [edges[-1] - 0.48, edges[-1] - 1.48]
    heat = {
        "type": "heatmap", "z": rows, "x": list(range(len(grid))), "y": edges, "text": texts, "customdata": hovers,
        "texttemplate": "%{text}", "textfont": {"size": 12}, "hovertemplate": "%{customdata}<extra></extra>",
        "colorscale": "Cividis", "reversescale": not evidence.metric.larger_is_better, "xgap": 2, "hoverongaps": False,
        "colorbar": {
            "orientation": "h", "thickness": 10, "len": 0.5, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
            "tickformat": value_format(evidence.metric), "outlinewidth": 0, "nticks": 3,
            "tickfont": {"size": 11, "color": "--soft"},
            "title": {"text": label(evidence.metric.name), "side": "top", "font": {"size": 11, "color": "--soft"}},
        },
    }  # fmt: skip
    heat |= {"zmin": 0, "zmax": 1} if evidence.metric.fraction else {}
    x = axis("learning rate", tickvals=list(range(len(grid))), ticktext=ticks(grid), showgrid=False, showline=False)
    y = axis("", showticklabels=False, showgrid=False, showline=False, ticks="", range=[edges[-1], 0])
    drawn = layout(x, y, annotations=notes, margin={"l": 6, "r": 6, "t": 64, "b": 44})
    return Figure("rates", [heat], drawn, 130 + 84 * len(table), _rates_alt(evidence.metric, table))


def best_mean(metric: Metric, cells: Sequence[GridCell]) -> float:
    means = [cell.mean for cell in cells if cell.mean is not None]
    return max(means, key=lambda mean: metric.sign * mean, default=0.0)


def _is_near(metric: Metric, mean: float, best: float) -> bool:
    """Return whether a mean counts as good as the best: within two points of a fraction."""
    return metric.sign * (mean - best) >= (-0.02 if metric.fraction else 0.0)


def _heat_text(metric: Metric, cell: GridCell | None, best: float, best_rate: float | None) -> str:
    if cell is None or cell.mean is None:
        return ""
    if cell.diverged and all(cell.diverged):
        return "✕"
    shown = f"{100 * cell.mean:.0f}" if metric.fraction else number(cell.mean, 2)
    if _is_near(metric, cell.mean, best):
        shown = f"<b>{shown}</b>"
    if best_rate is not None and np.isclose(cell.value, best_rate):
        shown = f"★<br>{shown}"
    return f"{shown}<br>✕{sum(cell.diverged)}" if any(cell.diverged) else shown


def _heat_words(metric: Metric, arm: str, cell: GridCell | None, value: float) -> str:
    if cell is None or cell.mean is None:
        return f"{label(arm)}, rate {number(value)}: not run"
    fate = f"{sum(cell.diverged)} of {len(cell.diverged)} runs diverged"
    mean = f"mean {label(metric.name)} {value_words(metric, cell.mean)}"
    return f"{label(arm)}, rate {number(value)}<br>{mean}<br>{fate}"


def _rates_alt(metric: Metric, table: dict[str, list[GridCell]]) -> str:
    words = [f"Mean best validation {metric.name} for each arm and learning rate."]
    for arm, cells in table.items():
        scored = [cell for cell in cells if cell.mean is not None]
        if scored:
            best = max(scored, key=lambda cell: metric.sign * (cell.mean or 0.0))
            near = [c.value for c in scored if _is_near(metric, c.mean or 0.0, best.mean or 0.0)]
            words.append(
                f"{arm}: best {value_words(metric, best.mean)} at rate {number(best.value)}, "
                f"as good from {number(min(near))} to {number(max(near))}."
            )
    return " ".join(words)


def sweep(evidence: StudyEvidence, swept: str, title: str) -> Figure | None:
    """Return the figure of accuracy over a grid of weight decay or dropout.

    Dots are seeds, bars are 95 % intervals of their mean.
    """
    table = {arm: cells for arm in evidence.arms if (cells := evidence.cells(arm, swept))}
    grid = sorted({cell.value for cells in table.values() for cell in cells})
    if not grid:
        return None
    reach = min(0.32, 0.1 * (len(table) - 1))
    offsets = np.linspace(-reach, reach, len(table))
    data = []
    for offset, (arm, cells) in zip(offsets, table.items(), strict=True):
        data += _sweep_traces(evidence, arm, cells, grid, float(offset))
    seen = [a for cells in table.values() for cell in cells for a in cell.accuracies]
    pad = max(0.02 if evidence.metric.fraction else 0.0, 0.12 * (max(seen) - min(seen)))
    x = axis(title, tickvals=list(range(len(grid))), ticktext=ticks(grid), range=[-0.5, len(grid) - 0.5])
    ends = [min(seen) - pad, max(seen) + pad]
    y = value_axis(evidence, range=[max(0.0, ends[0]), min(1.0, ends[1])] if evidence.metric.fraction else ends)
    alt = f"Validation {evidence.metric.name} over the grid of {title}. " + " ".join(
        f"{arm}: " + ", ".join(f"{value_words(evidence.metric, c.mean)} at {number(c.value)}" for c in cells) + "."
        for arm, cells in table.items()
    )
    return Figure(swept, data, layout(x, y, showlegend=True), 310 + 14 * len(table), alt, title.capitalize())


def _sweep_traces(
    evidence: StudyEvidence, arm: str, cells: list[GridCell], grid: list[float], offset: float
) -> list[Plotly]:
    color, name = arm_color(evidence.arms, arm), label(arm)
    scored = [cell for cell in cells if cell.accuracies]
    at = [grid.index(cell.value) + offset for cell in scored]
    means = [float(np.mean(cell.accuracies)) for cell in scored]
    halves = [cell.half_width() for cell in scored]
    dots = [
        (x, accuracy, bad)
        for x, cell in zip(at, scored, strict=True)
        for accuracy, bad in zip(cell.accuracies, cell.diverged, strict=True)
    ]
    seeds = {
        "type": "scatter", "mode": "markers", "x": [d[0] - 0.07 for d in dots], "y": [d[1] for d in dots],
        "marker": {
            "size": [9 if d[2] else 5 for d in dots], "color": color, "opacity": 0.5,
            "symbol": ["x-thin" if d[2] else "circle" for d in dots],
            "line": {"width": [1.6 if d[2] else 0 for d in dots], "color": color},
        },
        "showlegend": False, "legendgroup": name, "hoverinfo": "skip",
    }  # fmt: skip
    return [seeds, means_trace(evidence.arms, arm, at, means, halves, [number(cell.value) for cell in scored])]


def means_trace(
    arms: Sequence[str], arm: str, x: list[float], means: list[float], halves: list[float | None], names: list[str]
) -> Plotly:
    """Return an arm's means over the levels that `names` tells, with bars for half of their intervals."""
    color, name = arm_color(arms, arm), label(arm)
    return {
        "type": "scatter", "mode": "lines+markers", "x": x, "y": means, "name": name,
        "legendgroup": name, "line": {"color": color, "width": 2, "dash": arm_dash(arms, arm)},
        "marker": {"size": 8, "symbol": arm_mark(arms, arm), "color": color},
        "error_y": {"type": "data", "array": halves, "color": color, "thickness": 1.6, "width": 4},
        "customdata": names,
        "hovertemplate": "%{customdata}: %{y:.1%}<extra>" + name + "</extra>",
    }  # fmt: skip
