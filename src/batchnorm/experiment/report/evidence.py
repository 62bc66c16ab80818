"""What the study's files say, as plain numbers: no colors, no HTML.

Everything may be missing: an arm whose every run diverged has no best rate, a trace may have been deleted, a network
may have no affine layer. A missing thing is None or an empty list here, and the page says so in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ..analysis.intervals import student_half_width
from ..analysis.metric import Metric
from ..design.selection import BASE, rows_at

Trace = Mapping[str, Any]
AFFINE_LEVELS = (5, 25, 50, 75, 95)


def finite(value: Any) -> float | None:
    """Return the number, or None for what is no finite number (None, NaN, infinity, text)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Curve:
    """Validation accuracy against steps over one arm's seeds: the median run and the range of all of them."""

    arm: str
    steps: list[int]
    median: list[float]
    low: list[float]
    high: list[float]
    seeds: int
    to_target: list[float]  # steps to the target of the runs that reached it


@dataclass(frozen=True)
class GridCell:
    """One setting of one arm: the accuracy of its runs and how many of them diverged."""

    value: float
    accuracies: list[float]
    diverged: list[bool]

    @property
    def mean(self) -> float | None:
        return finite(np.mean(self.accuracies)) if self.accuracies else None

    def half_width(self) -> float | None:
        """Return half of the 95 % interval of the mean over seeds, None for fewer than two runs."""
        return student_half_width(self.accuracies)


@dataclass(frozen=True)
class Fan:
    """Percentiles of one hidden unit's pre-activation, (T, 3), and the medians of the other units, (T, U-1)."""

    arm: str
    layer: str
    unit: str
    steps: list[int]
    levels: list[float]
    values: np.ndarray
    others: np.ndarray


@dataclass(frozen=True)
class AffineLayer:
    """Percentiles `AFFINE_LEVELS` of one layer's weight (γ) and bias (β) over its features."""

    arm: str
    layer: str
    weight: list[float] | None
    bias: list[float] | None
    features: int


@dataclass
class StudyEvidence:
    """The study's files behind one set of questions; `traces(run_id)` may fail for a run whose file is gone."""

    summary: Mapping[str, Any]
    runs: pd.DataFrame
    traces: Callable[[str], Trace]
    _read: dict[str, Trace] = field(default_factory=dict, repr=False)

    @cached_property
    def arms(self) -> list[str]:
        named = self.summary.get("arms") or list(dict.fromkeys(self.runs.get("arm", [])))
        return [str(arm) for arm in named]

    def setting(self, arm: str, name: str) -> float | None:
        return finite((self.summary.get("settings", {}).get(arm) or {}).get(name))

    @property
    def target(self) -> float | None:
        return finite(self.summary.get("target_accuracy"))

    def trace(self, run_id: str) -> Trace:
        """Return the trace of a run, an empty one where it cannot be read: the report then shows less."""
        if run_id not in self._read:
            try:
                self._read[run_id] = self.traces(run_id) or {}
            except (OSError, KeyError, ValueError):
                self._read[run_id] = {}
        return self._read[run_id]

    @cached_property
    def metric(self) -> Metric:
        """Return what the runs are judged by; a summary without the entry speaks of accuracy."""
        told = self.summary.get("metric") or {}
        return Metric(**{key: value for key, value in told.items() if key in ("name", "larger_is_better", "fraction")})

    @cached_property
    def base_levels(self) -> dict[str, Any]:
        """Return the level of every setting but the learning rate at which the others are looked at."""
        return {**dict.fromkeys(BASE, 0.0), **(self.summary.get("base") or {})}

    def measured(self, arm: str, **setting: Any) -> pd.DataFrame:
        """Return the measuring runs of one arm, at the study's own batch size and optimizer where it has several.

        A column that the runs do not tell fixes nothing; settings that no claim is about are at their base.
        """
        extra = {name: level for name, level in self.base_levels.items() if name not in BASE}
        fixed = {**extra, **setting}
        untold = [name for name in fixed if name not in self.runs or self.runs[name].isna().all()]
        setting = {name: value for name, value in fixed.items() if name not in untold}
        return self.measured_at((self.summary.get("factors") or {}).get("own"), arm, **setting)

    def measured_at(self, level: Mapping[str, Any] | None, arm: str, **setting: Any) -> pd.DataFrame:
        """Return the measuring runs of one arm at the batch size and optimizer in `level`.

        A setting of None matches nothing.
        """
        if self.runs.empty:
            return self.runs
        own = {name: level[name] for name in ("batch_size", "optimizer")} if level else {}
        return rows_at(self.runs, purpose="measure", arm=arm, **own, **setting)

    def fastest_rate(self, arm: str) -> float | None:
        """Return the rate at which the arm's speed is compared."""
        fastest = self.setting(arm, "fastest_lr")
        return self.setting(arm, "best_lr") if fastest is None else fastest

    def base(self, arm: str) -> pd.DataFrame:
        """Return the arm's measuring runs at its own fastest rate, without weight decay or dropout."""
        return self.measured(arm, lr=self.fastest_rate(arm), **self.base_levels)

    def chosen(self, arm: str) -> pd.DataFrame:
        own = self.summary.get("settings", {}).get(arm) or {}
        return self.measured(arm, **{name: own.get(name) for name in ("lr", *self.base_levels)})

    def curve(self, arm: str) -> Curve | None:
        return self.curve_of(arm, self.base(arm))

    def curve_of(self, name: str, rows: pd.DataFrame) -> Curve | None:
        """Return the median and the range of these runs."""
        tracks = {row.run_id: self.trace(row.run_id) for row in rows.itertuples()}
        steps = sorted({step for trace in tracks.values() for step in trace.get("steps", []) if step > 0})
        lines = [_on_steps(tracks[row.run_id], row, steps) for row in rows.itertuples()]
        lines = [line for line in lines if line is not None]
        if not steps or not lines:
            return None
        table = np.array(lines)
        reached = rows["steps_to_target"].astype(float).dropna().tolist()
        middle, low, high = (f(table, axis=0).tolist() for f in (np.median, np.min, np.max))
        return Curve(name, steps, middle, low, high, len(lines), reached)

    def cells(self, arm: str, swept: str) -> list[GridCell]:
        """Return the arm's runs over the grid of `swept` ("lr", "weight_decay" or "dropout"), other settings fixed."""
        held = dict(self.base_levels)
        if swept != "lr":
            held["lr"] = self.setting(arm, "best_lr")
        held.pop(swept, None)
        rows = self.measured(arm, **held)
        if rows.empty:
            return []
        found = []
        for value, group in rows.groupby(rows[swept].astype(float)):
            scored = group[np.isfinite(group["val_accuracy"].astype(float))]
            accuracies = scored["val_accuracy"].astype(float).tolist()
            found.append(GridCell(float(value), accuracies, [_truth(flag) for flag in scored["diverged"]]))
        return found

    def typical_run(self, arm: str) -> Trace:
        """Return the trace of the base run whose drift is the middle one of its seeds (of the lower two when even)."""
        rows = self.base(arm)
        kept = rows[[not _truth(flag) for flag in rows["diverged"]]] if len(rows) else rows
        for run_id in _from_the_middle(kept):
            if trace := self.trace(run_id):
                return trace
        return {}

    def fan(self, arm: str) -> Fan | None:
        trace = self.typical_run(arm)
        percentiles = trace.get("percentiles") or {}
        try:
            values = np.array(percentiles.get("values", []), dtype=float)
            if values.ndim != 3 or values.shape[2] != 3 or 0 in values.shape:
                return None
        except (TypeError, ValueError):
            return None
        steps = np.array(trace.get("steps", []))[: len(values)]
        seen = (steps > 0) & np.isfinite(values).all(axis=(1, 2))
        if not seen.any():
            return None
        steps, values = steps[seen], values[seen]
        index = _typical_unit(values)
        units = percentiles.get("units") or list(range(values.shape[1]))
        others = np.delete(values[:, :, 1], index, axis=1)
        return Fan(
            arm, str(percentiles.get("layer", "hidden")), str(units[index]), steps.tolist(),
            [float(level) for level in percentiles.get("levels", (15, 50, 85))], values[:, index], others,
        )  # fmt: skip

    def affine(self, arm: str) -> list[AffineLayer]:
        """Return learned γ and β by layer, all base runs of the arm pooled."""
        weights: dict[str, list[float]] = {}
        biases: dict[str, list[float]] = {}
        for run_id in self.base(arm)["run_id"] if len(self.base(arm)) else []:
            for layer in self.trace(run_id).get("affine") or []:
                name = str(layer.get("layer", "?"))
                weights.setdefault(name, []).extend(layer.get("weight") or [])
                biases.setdefault(name, []).extend(layer.get("bias") or [])
        found = [
            AffineLayer(arm, name, _spread(weights[name]), _spread(biases[name]), len(weights[name]))
            for name in weights
        ]
        return [layer for layer in found if layer.weight or layer.bias]

    def diverged(self, arm: str | None = None) -> int:
        rows = self.runs if arm is None or self.runs.empty else self.runs[self.runs["arm"].astype(str) == arm]
        return sum(_truth(flag) for flag in rows.get("diverged", []))


def _truth(flag: Any) -> bool:
    return str(flag).strip().lower() in ("true", "1", "1.0")


def _on_steps(trace: Trace, row: Any, steps: Sequence[int]) -> list[float] | None:
    """Return one run's accuracy at `steps`; after it diverged it counts as chance, which its row records."""
    pairs = zip(trace.get("steps", []), trace.get("val_accuracy", []), strict=False)
    known = {step: value for step, value in pairs if finite(value) is not None}
    if not known:
        return None
    after = float(row.val_accuracy) if _truth(row.diverged) else None
    last = max(known)
    line = [float(np.interp(step, list(known), list(known.values()))) for step in steps]
    return [value if step <= last or after is None else after for step, value in zip(steps, line, strict=True)]


def _from_the_middle(rows: pd.DataFrame) -> list[str]:
    """Return the run_ids, those first whose drift is nearest to the middle of the ranking."""
    if rows.empty:
        return []
    ranked = rows.sort_values("drift")["run_id"].tolist() if "drift" in rows else rows["run_id"].tolist()
    middle = (len(ranked) - 1) // 2
    return [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: abs(i - middle))]


def _typical_unit(values: np.ndarray) -> int:
    """Return the index of the unit whose median travels the median distance of all units (values: (T, U, 3))."""
    travel = np.abs(np.diff(values[:, :, 1], axis=0)).sum(axis=0)
    return int(np.argsort(travel, kind="stable")[(len(travel) - 1) // 2])


def _spread(values: list[float]) -> list[float] | None:
    kept = [value for value in values if finite(value) is not None]
    return [float(q) for q in np.percentile(kept, AFFINE_LEVELS)] if kept else None
