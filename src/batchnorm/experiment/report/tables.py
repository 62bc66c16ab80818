"""The report's tables: the numbers behind each figure, the layers, the settings, the provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..analysis.metric import Metric
from .cards import SYMBOLS
from .evidence import AFFINE_LEVELS, GridCell, StudyEvidence, finite
from .style import number, value_words

VERSIONED = ("batchnorm", "torch", "python")
FEW_VALUES = 26  # values in one mean; with fewer, the noise of batch statistics starts to do harm


@dataclass(frozen=True)
class Table:
    """`head` and `rows` of texts; the first `lead` columns are words (left), the others numbers (right)."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    lead: int = 1


def accuracy(evidence: StudyEvidence) -> Table | None:
    rows = []
    for arm in evidence.arms:
        if curve := evidence.curve(arm):
            reached = f"{len(curve.to_target)} of {curve.seeds}"
            middle = number(np.median(curve.to_target)) if curve.to_target else "—"
            ends = [value_words(evidence.metric, v) for v in (curve.median[-1], curve.low[-1], curve.high[-1])]
            rows.append([arm, number(evidence.fastest_rate(arm)), reached, middle, *ends])
    head = ["Arm", "Learning rate", "Reached target", "Median steps to it"]
    head += [f"Last {evidence.metric.name}", "Lowest seed", "Highest seed"]
    caption = "Each arm at its own fastest rate; steps are of the runs that reached the target."
    return Table(caption, head, rows) if rows else None


def grid(evidence: StudyEvidence, swept: str, title: str) -> Table | None:
    """Return the mean accuracy and the number of diverged runs: one row a value of the grid, one column an arm."""
    table = {arm: {cell.value: cell for cell in evidence.cells(arm, swept)} for arm in evidence.arms}
    values = sorted({value for cells in table.values() for value in cells})
    metric = evidence.metric
    rows = [[number(value), *(_grid_words(metric, table[arm].get(value)) for arm in evidence.arms)] for value in values]
    caption = f"Mean best validation {metric.name} over the measuring seeds."
    return Table(caption, [title, *evidence.arms], rows) if rows else None


def _grid_words(metric: Metric, cell: GridCell | None) -> str:
    if cell is None or cell.mean is None:
        return "—"
    lost = f" ({sum(cell.diverged)} of {len(cell.diverged)} diverged)" if any(cell.diverged) else ""
    return value_words(metric, cell.mean) + lost


def fans(evidence: StudyEvidence) -> Table | None:
    found = [fan for arm in evidence.arms if (fan := evidence.fan(arm))]
    rows = []
    for fan in found:
        for word, at in (("first", 0), ("last", -1)):
            where = [fan.arm, f"{fan.layer}, unit {fan.unit}", f"{word} look, step {fan.steps[at]:,}"]
            rows.append([*where, *(number(value) for value in fan.values[at])])
    levels = [f"{level:g} %" for level in found[0].levels] if found else []
    caption = "Percentiles of the pre-activation over the validation samples."
    return Table(caption, ["Arm", "Unit", "When", *levels], rows, lead=3) if rows else None


def affine(evidence: StudyEvidence) -> Table | None:
    rows = []
    for layer in (layer for arm in evidence.arms for layer in evidence.affine(arm)):
        for word, spread in (("γ", layer.weight), ("β", layer.bias)):
            if spread:
                rows.append([layer.arm, layer.layer, word, *(number(value) for value in spread)])
    head = ["Arm", "Layer", "", *(f"{level} %" for level in AFFINE_LEVELS)]
    return Table("Percentiles over features and seeds.", head, rows, lead=3) if rows else None


def layers(evidence: StudyEvidence) -> list[Table]:
    """Return one table for each group of arms with the same layers."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for arm in evidence.arms:
        own = (evidence.summary.get("layers") or {}).get(arm) or []
        rows = tuple(tuple(_layer_row(layer)) for layer in own)
        groups.setdefault(rows, []).append(arm)
    head = ["Layer", "Kind", "Features", "Positions w·h", "m = b·w·h"]
    return [Table(", ".join(arms), head, [list(row) for row in rows], lead=2) for rows, arms in groups.items() if rows]


def _layer_row(layer: dict[str, Any]) -> list[str]:
    name, kind = str(layer.get("name", "?")), str(layer.get("kind", "?"))
    features, positions, m = (finite(layer.get(key)) for key in ("features", "positions", "m"))
    sizes = ["—" if size is None else f"{size:,.0f}" for size in (features, positions, m)]
    if m is not None and m < FEW_VALUES and "BatchNorm" in kind:
        sizes[2] += " (few)"
    return [name, kind, *sizes]


def settings(evidence: StudyEvidence) -> Table:
    rows = []
    for arm in evidence.arms:
        chosen = evidence.chosen(arm)
        runs = evidence.runs[evidence.runs["arm"].astype(str) == arm] if len(evidence.runs) else evidence.runs
        values = [
            number(evidence.setting(arm, key)) for key in ("fastest_lr", "best_lr", "lr", "weight_decay", "dropout")
        ]
        scores = [
            _mean_and_spread(evidence.metric, chosen[key]) if len(chosen) else "—"
            for key in ("val_accuracy", "test_accuracy")
        ]
        rows.append([arm, *values, *scores, str(len(runs)), str(evidence.diverged(arm))])
    head = ["Arm", "Fastest rate", "Best rate", "Rate", "Weight decay", "Dropout"]
    head += ["Validation", "Test", "Runs", "Diverged"]
    caption = (
        "Fastest and best rate: soonest at the target, and of the highest accuracy, with neither weight decay nor "
        "dropout. The next columns: the setting chosen for the arm, and its "
        "accuracy, mean ± standard deviation over the measuring seeds."
    )
    return Table(caption, head, rows)


def _mean_and_spread(metric: Metric, values: Any) -> str:
    known = [value for value in map(finite, values) if value is not None]
    if not known:
        return "—"
    if not metric.fraction:
        return number(np.mean(known)) + (f" ± {number(np.std(known, ddof=1), 2)}" if len(known) > 1 else "")
    spread = f" ± {100 * np.std(known, ddof=1):.1f}" if len(known) > 1 else ""
    return f"{100 * np.mean(known):.1f}{spread} %"


def comparisons(evidence: StudyEvidence) -> list[Table]:
    """Return, for each claim, all arms against the first, from the best to the worst; none for two arms."""
    found = evidence.summary.get("comparisons") or {}
    return [
        Table(name.replace("_", " "), ["Arm", "Verdict", "In words"], [_compared(e) for e in entries], lead=3)
        for name, entries in found.items()
    ]


def _compared(entry: dict[str, Any]) -> list[str]:
    verdict = str(entry.get("verdict"))
    level = f"{number(100 * entry.get('level', 0.95), 4)} % interval"
    text = str(entry.get("text", "")).replace("95 % interval", level)
    return [str(entry.get("arm")), f"{SYMBOLS.get(verdict, '')} {verdict}", text]


def provenance(evidence: StudyEvidence) -> list[tuple[str, str]]:
    """Return pairs of name and value: what is needed to run the study again."""
    summary, data = evidence.summary, evidence.summary.get("data") or {}
    seeds = summary.get("seeds") or {}
    grids = summary.get("grids") or {}
    rows = [
        ("Command", summary.get("command")),
        ("Made", str(summary.get("created") or "").replace("T", " ")),
        ("Runs", f"{len(evidence.runs):,}, of which {evidence.diverged():,} diverged"),
        ("Time", _duration(summary.get("seconds"))),
        ("Data", _data_words(data)),
        ("Classes", _class_words(data.get("labels") or [])),
        ("Network", summary.get("model")),
        ("Batch size, optimizer, steps", _common(evidence, ("batch_size", "optimizer", "steps"))),
        *((f"Grid of {name.replace('_', ' ')}", _numbers(values)) for name, values in grids.items()),
        *((f"Seeds that {name}", _numbers(values)) for name, values in seeds.items()),
        ("Versions", ", ".join(f"{key} {summary[key]}" for key in VERSIONED if summary.get(key))),
        ("Platform", summary.get("platform")),
        ("Commit", summary.get("commit") or "not recorded: run outside a git checkout"),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _numbers(values: Any) -> str:
    if isinstance(values, Sequence) and not isinstance(values, str):
        return ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
    return str(values)


def _duration(seconds: Any) -> str:
    known = finite(seconds)
    if known is None:
        return ""
    return f"{known:.0f} seconds" if known < 120 else f"{known / 60:.0f} minutes"


def _data_words(data: dict[str, Any]) -> str:
    parts = [str(data.get("name", "unnamed"))]
    if (samples := finite(data.get("samples"))) is not None:
        shape = "×".join(str(size) for size in data.get("shape") or [])
        parts.append(f"{samples:,.0f} samples" + (f" of shape {shape}" if shape else ""))
    sizes = [(part, finite(data.get(part))) for part in ("train", "validation", "test")]
    split = [f"{part} {size:,.0f}" for part, size in sizes if size is not None]
    return ", ".join(parts) + (f" ({', '.join(split)})" if split else "")


def _class_words(labels: Sequence[Any]) -> str:
    shown = ", ".join(str(name) for name in labels[:20])
    return f"{len(labels)}: {shown}{', …' if len(labels) > 20 else ''}" if labels else ""


def _common(evidence: StudyEvidence, columns: Sequence[str]) -> str:
    found = []
    for column in columns:
        values = evidence.runs[column].dropna().unique().tolist() if column in evidence.runs else []
        found.append(" / ".join(number(v, 6) if finite(v) is not None else str(v) for v in values) or "—")
    return ", ".join(found)
