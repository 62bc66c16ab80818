"""Figures of what goes on inside the network: the percentile fans, and the learned γ and β."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .evidence import AffineLayer, Fan, StudyEvidence
from .figures import Figure, Plotly, axis, band, layout, note, rule, step_axis
from .style import arm_color, arm_mark, faded, label, number


@dataclass(frozen=True)
class Zone:
    """Pre-activations outside [low, high] where the unit hardly learns, and why, in words."""

    low: float
    high: float
    words: str
    reading: str


# Where the sigmoid's slope σ(1−σ) is a tenth of its peak 1/4: σ(z) = (1 ± √0.9)/2, z = ±log(σ/(1−σ)) = ±3.64.
_SATURATED = math.log((1 + math.sqrt(0.9)) / (1 - math.sqrt(0.9)))
ZONES = {
    "sigmoid": Zone(
        -_SATURATED, _SATURATED, "sigmoid saturates",
        f"Shaded: the sigmoid is saturated. Beyond ±{_SATURATED:.1f} its slope is under a tenth of its peak, so hardly "
        "any gradient passes and the unit stops learning.",
    ),
    "relu": Zone(
        0.0, math.inf, "ReLU is off",
        "Shaded: the ReLU is off. Below 0 its slope is zero, so samples that fall there send no gradient through the "
        "unit.",
    ),
}  # fmt: skip
_BUILT_IN = {"mlp": "sigmoid", "cnn": "relu"}


def zone_of(summary: Mapping[str, Any]) -> Zone | None:
    """Return the zone of a built-in network's hidden activation; a user's network may use any, so none is drawn."""
    return ZONES.get(_BUILT_IN.get(str(summary.get("model")), ""))


def fans(evidence: StudyEvidence) -> list[Figure]:
    """Return one figure an arm, all with the same axes."""
    found = [fan for arm in evidence.arms if (fan := evidence.fan(arm))]
    if not found:
        return []
    zone = zone_of(evidence.summary)
    low, high = _value_range(found, zone)
    steps = [step for fan in found for step in fan.steps]
    return [_fan(evidence, fan, index, zone, (low, high), steps) for index, fan in enumerate(found)]


def _value_range(found: list[Fan], zone: Zone | None) -> tuple[float, float]:
    """Return the range that holds every fan, and the border of the zone, so that its distance can be seen."""
    low = min(float(fan.values.min()) for fan in found)
    high = max(float(fan.values.max()) for fan in found)
    if zone:
        low, high = (
            min(low, zone.low - 0.8),
            max(high, min(zone.high, 0.0 if math.isinf(zone.high) else zone.high) + 0.8),
        )
    pad = 0.06 * (high - low or 1.0)
    return low - pad, high + pad


def _fan(
    evidence: StudyEvidence, fan: Fan, index: int, zone: Zone | None, limits: tuple[float, float], steps: list[int]
) -> Figure:
    color = arm_color(evidence.arms, fan.arm)
    lines = [fan.values[:, i].tolist() for i in range(3)]
    data: list[Plotly] = [
        {
            "type": "scatter", "mode": "lines", "x": fan.steps, "y": other.tolist(), "hoverinfo": "skip",
            "line": {"color": faded(color, 0.35), "width": 1},
        }
        for other in fan.others.T
    ]  # fmt: skip
    data.append(band(fan.steps, lines[0], lines[2], color))
    for line, level, width in zip(lines, fan.levels, (1.6, 2.8, 1.6), strict=False):
        data.append({
            "type": "scatter", "mode": "lines", "x": fan.steps, "y": line,
            "line": {"color": color, "width": width},
            "hovertemplate": f"step %{{x:,d}}: %{{y:.2f}}<extra>{level:g}th percentile</extra>",
        })  # fmt: skip
    y = axis("pre-activation", range=list(limits))
    drawn = layout(step_axis(steps), y, margin={"l": 44, "r": 40, "t": 8, "b": 44})
    drawn["annotations"] = _level_notes(fan, limits)
    if zone:
        drawn["shapes"], notes = _shade(zone, limits)
        drawn["annotations"] += notes
    alt = (
        f"{fan.arm}, unit {fan.unit} of {fan.layer}: its percentiles {_three(fan.levels)} move from "
        f"{_three(fan.values[0])} at step {fan.steps[0]} to {_three(fan.values[-1])} at step {fan.steps[-1]}."
    )
    return Figure(f"fan{index}", data, drawn, 320, alt, fan.arm)


def _three(values: Any) -> str:
    first, middle, last = (number(value) for value in values)
    return f"{first}, {middle} and {last}"


def _level_notes(fan: Fan, limits: tuple[float, float]) -> list[Plotly]:
    """Return the names of the levels at the right ends of the curves, moved where the curves end close together."""
    gap = 0.07 * (limits[1] - limits[0])
    low, middle, high = (float(value) for value in fan.values[-1])
    places = (min(low, middle - gap), middle, max(high, middle + gap))
    return [
        note(f"{level:g} %", xref="paper", x=1.01, xanchor="left", y=place, yanchor="middle")
        for place, level in zip(places, fan.levels, strict=False)
    ]


def _shade(zone: Zone, limits: tuple[float, float]) -> tuple[list[Plotly], list[Plotly]]:
    bands = [(limits[0], zone.low), (zone.high, limits[1])]
    shapes = [
        {
            "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": start, "y1": end, "layer": "below",
            "line": {"width": 0}, "fillcolor": "--zone",
        }
        for start, end in bands
        if math.isfinite(start) and math.isfinite(end) and start < end
    ]  # fmt: skip
    words = note(zone.words, xref="paper", x=0.02, xanchor="left", y=limits[0], yanchor="bottom")
    return shapes, [words]


def affine(evidence: StudyEvidence) -> list[Figure]:
    """Return the figures of learned γ and β by layer as boxes: quartiles, whiskers to the 5th and 95th percentile."""
    layers = [layer for arm in evidence.arms for layer in evidence.affine(arm)]
    names = list(dict.fromkeys(layer.layer for layer in layers))
    parts = [("weight", "γ (weight)", 1.0), ("bias", "β (bias)", 0.0)]
    drawn = (_affine(evidence, layers, names, *part) for part in parts)
    return [figure for figure in drawn if figure]


def _affine(
    evidence: StudyEvidence, layers: list[AffineLayer], names: list[str], part: str, title: str, start: float
) -> Figure | None:
    data = []
    for arm in evidence.arms:
        own = [(layer.layer, spread) for layer in layers if layer.arm == arm and (spread := getattr(layer, part))]
        if not own:
            continue
        color = arm_color(evidence.arms, arm)
        low, first, middle, third, high = (list(column) for column in zip(*(spread for _, spread in own), strict=True))
        data.append({
            "type": "box", "name": label(arm), "x": [names.index(name) for name, _ in own], "lowerfence": low,
            "q1": first, "median": middle, "q3": third, "upperfence": high, "line": {"color": color, "width": 1.6},
            "fillcolor": faded(color, 0.25), "marker": {"symbol": arm_mark(evidence.arms, arm)},
        })  # fmt: skip
    if not data:
        return None
    shown = [label(name, 18) for name in names]
    x = axis("", tickvals=list(range(len(names))), ticktext=shown, showgrid=False, range=[-0.6, len(names) - 0.4])
    x.update(autotickangles=[0, -35, -70], ticklabeloverflow="allow")
    drawn = layout(x, axis(title, zeroline=False), showlegend=True, boxmode="group")
    drawn["shapes"] = [rule(start)]
    alt = f"Learned {title} by layer; training starts at {start:g}. " + " ".join(
        f"{layer.arm}, {layer.layer}: median {number(q[2])}, middle half {number(q[1])} to {number(q[3])}."
        for layer in layers
        if (q := getattr(layer, part))
    )
    return Figure(part, data, drawn, 320 + 10 * len(data), alt, title)
