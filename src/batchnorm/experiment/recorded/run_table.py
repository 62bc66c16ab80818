"""From logged values to runs: one row a run with the columns of runs.csv, its trace, and which seeds choose."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ..analysis.measures import TOLERANCE
from ..analysis.metric import Metric
from ..analysis.target import steps_to
from ..design.selection import rows_at
from ..output.study_folder import COLUMNS
from .long_table import LongTable

REGULARIZERS = ("weight_decay", "dropout")
# Stand in for a column that the table does not have, so that it fixes nothing.
_ABSENT: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "dropout": 0.0}


@dataclass(frozen=True)
class RunTable:
    """Runs as the estimators take them.

    Attributes:
        scores: a row a run; `val_accuracy`, `test_accuracy` and `final_val_accuracy` are scores of `metric`.
        traces: by run_id the steps and scores of the validation rows.
        base: the level of every setting but the learning rate at which the others are looked at.
        tested: whether the table has test rows.
        budget: the steps that every run was given.
        untrained: chance, or the median first score of the runs where that is not given.
        absent: the settings that a claim is about and the table does not tell.
    """

    scores: pd.DataFrame
    traces: Mapping[str, dict[str, Any]]
    metric: Metric
    base: dict[str, Any]
    tested: bool
    budget: int
    untrained: float
    absent: tuple[str, ...]

    def values(self) -> pd.DataFrame:
        """Return the rows with the metric's own values in place of scores."""
        columns = ["val_accuracy", "test_accuracy", "final_val_accuracy"]
        shown = {name: self.metric.value(self.scores[name]) for name in columns}
        return self.scores.assign(**shown, **dict.fromkeys(self.absent, np.nan))

    def trace(self, run_id: str) -> dict[str, Any]:
        """Return a run's trace with the metric's own values."""
        trace = self.traces[run_id]
        return {**trace, "val_accuracy": [float(self.metric.value(v)) for v in trace["val_accuracy"]]}


def make_runs(table: LongTable, metric: Metric, chance: float | None) -> RunTable:
    """Return the runs of a table.

    A run's validation score is its best; its test score is that at the same step or at the last test row before it
    (else the first). Without test rows the last validation value takes its place, which no maximum has chosen. A run
    with a value that is not finite has diverged: its scores are chance, or its first value where chance is not given.
    """
    metric = _scaled(metric, table.rows)
    rows = table.rows.assign(score=metric.score(table.rows["metric"]))
    tested = bool((rows["split"] == "test").any())
    keys = ["arm", "seed", *table.settings, *(["purpose"] if "purpose" in rows else [])]
    lowest = float(rows["score"][np.isfinite(rows["score"])].min())
    lost = None if chance is None else metric.score(chance)
    made, traces = [], {}
    for key, group in rows.groupby(keys, sort=False):
        named = dict(zip(keys, key, strict=True))
        if (group["split"] == "val").any():
            row, trace = _run(named, group.sort_values("step"), lost, lowest)
            made.append(row)
            traces[row["run_id"]] = trace
    scores = _with_columns(pd.DataFrame(made), table.settings)
    whole = scores[~scores["diverged"]]
    budget = int((whole if len(whole) else scores)["steps"].min())
    base = {name: _base_level(scores[name]) for name in (*REGULARIZERS, *extras(table))}
    absent = tuple(name for name in _ABSENT if name not in table.settings)
    first = [trace["val_accuracy"][0] for trace in traces.values() if trace["val_accuracy"]]
    untrained = lost if lost is not None else statistics.median(first or [lowest])
    return RunTable(_with_purposes(scores), traces, metric, base, tested, budget, untrained, absent)


def extras(table: LongTable) -> list[str]:
    """Return the settings that no claim is about."""
    return [name for name in table.settings if name not in _ABSENT]


def _scaled(metric: Metric, rows: pd.DataFrame) -> Metric:
    """Return the metric with its score.

    Values in [0, 1] of which more is better are fractions. For others 0 is the median first value and 1 the best.
    """
    values = rows["metric"][np.isfinite(rows["metric"]) & (rows["split"] == "val")]
    if metric.larger_is_better and len(values) and values.between(0, 1).all():
        return metric
    free = replace(metric, fraction=False)
    if values.empty:
        return free
    first = rows.loc[values.index].sort_values("step").groupby(["arm", "seed"], sort=False)["metric"].first()
    origin = float(first.median())
    best = float(values.max() if metric.larger_is_better else values.min())
    return replace(free, origin=origin, length=abs(best - origin) or 1.0)


def _run(
    named: Mapping[str, Any], group: pd.DataFrame, chance: float | None, lowest: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    val, test = (group[group["split"] == split] for split in ("val", "test"))
    finite = val[np.isfinite(val["score"])]
    diverged = len(finite) < len(val) or not np.isfinite(test["score"]).all()
    if diverged:
        lost = chance if chance is not None else float(finite["score"].iloc[0]) if len(finite) else lowest
        best = last = tested = lost
    else:
        at = int(finite["step"].loc[finite["score"].idxmax()])
        best, last = float(finite["score"].max()), float(finite["score"].iloc[-1])
        before = test[test["step"] <= at]
        there = before["score"].iloc[-1:] if len(before) else test["score"].iloc[:1]
        tested = float(there.max()) if len(test) else last
    row = {
        "run_id": _run_id(named), **named, "steps": int(group["step"].max()), "val_accuracy": best,
        "test_accuracy": tested, "final_val_accuracy": last, "diverged": diverged,
    }  # fmt: skip
    return row, {"run_id": row["run_id"], "steps": finite["step"].tolist(), "val_accuracy": finite["score"].tolist()}


def _run_id(named: Mapping[str, Any]) -> str:
    """Return a name of the run that is safe as a file's."""
    others = {key: f"{value:g}" if isinstance(value, float) else value for key, value in named.items() if key != "arm"}
    words = [named["arm"], *(f"{key}{value}" for key, value in others.items())]
    return re.sub(r"[^\w.+-]+", "_", "-".join(str(word) for word in words))


def _with_columns(scores: pd.DataFrame, settings: tuple[str, ...]) -> pd.DataFrame:
    """Return the rows with every column of runs.csv; a setting that the table does not tell is the same in all."""
    empty = {name: np.nan for name in COLUMNS if name not in scores.columns}
    more = [name for name in settings if name not in COLUMNS]
    table = scores.assign(**{**empty, **{name: value for name, value in _ABSENT.items() if name in empty}})
    return table.assign(optimizer=table["optimizer"].astype(object))[[*COLUMNS, *more]]


def _base_level(column: pd.Series) -> Hashable:
    """Return 0 where it is among the levels of a regularizer, else the most frequent one, the first of several."""
    if column.name in REGULARIZERS and (column == 0).any():
        return 0.0
    counts = column.value_counts(sort=False)
    return next(level for level in dict.fromkeys(column) if counts[level] == counts.max())


def _with_purposes(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with `purpose`: of four seeds and more the two smallest choose, of three the smallest."""
    if scores["purpose"].notna().all():
        return scores
    seeds = sorted(set(scores["seed"]))
    fewest = int(scores.groupby("arm")["seed"].nunique().min())
    choosing = seeds[: 2 if fewest >= 4 else 1 if fewest == 3 else 0]
    return scores.assign(purpose=np.where(scores["seed"].isin(choosing), "choose", "measure"))


class NoTarget(Exception):
    """No target can be told from the runs; the message is a clause that says why."""


def target_score(runs: RunTable, arm: str, settings: Mapping[str, Mapping[str, Any]]) -> float:
    """Return what the baseline attains, as far as seeds agree.

        target = A − max(4 s, 0.02)

    A is the median of the choosing seeds' best scores at the arm's best rate, s the standard deviation between seeds,
    pooled over all arms at their best rates. Both keep the target off the plateau, where which run is first is a
    lottery. A target that is not as far above what is untrained is none: a run that has learnt nothing may reach it.

    Raises:
        NoTarget: says why there is none.
    """
    at = {
        name: rows_at(runs.scores, arm=name, lr=setting["best_lr"], **runs.base) for name, setting in settings.items()
    }
    if at[arm].empty:
        raise NoTarget(f"{arm} has no run at the level at which the others are compared")
    chose = at[arm][at[arm]["purpose"] == "choose"]["val_accuracy"]
    if chose.empty:
        raise NoTarget("fewer than three seeds an arm, and the smallest must set it (or give one)")
    groups = [rows["val_accuracy"][~rows["diverged"]] for rows in at.values()]
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    spread = math.sqrt(squares / max(1, sum(len(group) - 1 for group in groups if len(group))))
    attained = float(chose.median())
    target = attained - max(4 * spread, TOLERANCE)
    if target <= runs.untrained + TOLERANCE:
        told = f"{arm} attains {runs.metric.words(attained)}, untrained is {runs.metric.words(runs.untrained)}"
        raise NoTarget(f"{told}, and the spread between seeds is as large as the difference")
    return target


def with_arrivals(runs: RunTable, target: float | None) -> RunTable:
    """Return the runs with `steps_to_target`, NaN where a run does not get there."""
    arrived = [
        np.nan if row.diverged else steps_to(target, runs.traces[row.run_id]) for row in runs.scores.itertuples()
    ]
    return replace(runs, scores=runs.scores.assign(steps_to_target=pd.array(arrived, dtype="float64")))
