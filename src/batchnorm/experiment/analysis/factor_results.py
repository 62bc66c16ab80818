"""Results of the runs over batch sizes and optimizers: one cell for each arm and level, and claims.

Three questions of each arm, a level against the study's own: what does it do to the test accuracy, and how many times
the updates, the samples and the seconds does it take to the target? And one question of each level: how do the last
and the first arm compare there? Estimators, sources, and when they mislead: docs/study.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..design.factors import Factors, Level, choose_level_rates
from ..design.plan import StudyPlan
from ..design.selection import rows_at
from ..training.runs import Run
from . import wording
from .claims import (
    Claim,
    accuracy_step,
    claim_difference,
    make_claim,
    octaves_to_target,
    power_of_two,
    sample_of,
    unclaimed,
)
from .intervals import (
    CensoredSample,
    Interval,
    censored_difference,
    finite_or_none,
    student_half_width,
)

UNITS = ("updates", "samples", "seconds")


@dataclass(frozen=True)
class LevelCell:
    """One arm at one level: its rows at its best and at its fastest rate, all seeds, and what an update costs."""

    arm: str
    level: Level
    lr: float
    fastest_lr: float
    at_best: pd.DataFrame
    at_fastest: pd.DataFrame
    batch: int
    seconds: float

    @property
    def measured(self) -> pd.DataFrame:
        return self.at_fastest[self.at_fastest["purpose"] == "measure"]

    def cost(self, unit: str) -> float:
        """Return what one update takes of the unit."""
        return {"updates": 1.0, "samples": float(self.batch), "seconds": self.seconds}[unit]

    def octaves(self) -> CensoredSample:
        """Return log2 of the updates to the target at the fastest rate."""
        return octaves_to_target(self.at_fastest, self.level.steps)


def results(
    plan: StudyPlan,
    factors: Factors,
    runs: pd.DataFrame,
    settings: Mapping[str, Mapping[str, float]],
    target: float | None,
    samples: int,
    costs: Callable[[list[Run]], Mapping[Run, float]],
) -> dict[str, Any]:
    """Return the `factors` entry of summary.json.

    Args:
        runs: every row of the study with `steps_to_target`.
        settings: each arm's best and fastest rate at the study's own level.
        target: the accuracy that `steps_to_target` refers to.
        samples: the size of the training part, which no batch exceeds.
        costs: gives the seconds that one update of each run takes.
    """
    rates = _rates(plan, factors, runs, settings)
    # The cost of an update does not depend on the rate. The smallest rate is timed, because its loss stays finite.
    timed = {(level, arm): level.run(arm, "measure", plan.measure_seeds[0], min(level.lrs)) for level, arm in rates}
    seconds = costs(list(timed.values()))
    cells = {
        (level, arm): _cell(arm, level, pair, runs, samples, seconds[timed[level, arm]])
        for (level, arm), pair in rates.items()
    }
    entries = [_entry(cells.get((level, arm)), level, arm, factors) for level in factors.levels for arm in plan.arms]
    return {
        "own": {"batch_size": plan.batch_size, "optimizer": plan.optimizer},
        "levels": {
            name: [level.name for level in levels]
            for name, levels in (("batch_size", factors.batch_sizes), ("optimizer", factors.optimizers))
            if levels
        },
        "cells": entries,
        "claims": _claims(plan, factors, cells, target),
    }


def _rates(
    plan: StudyPlan, factors: Factors, runs: pd.DataFrame, settings: Mapping[str, Mapping[str, float]]
) -> dict[tuple[Level, str], tuple[float, float]]:
    """Return the best and the fastest rate of every arm at every level at which it can train."""
    chosen = choose_level_rates(factors, plan, runs)
    own = {arm: (settings[arm]["best_lr"], settings[arm]["fastest_lr"]) for arm in plan.arms}
    return {
        (level, arm): pair
        for level in factors.levels
        for arm, pair in chosen.get(level, own).items()
        if (level, arm) not in factors.impossible
    }


def _cell(
    arm: str, level: Level, rates: tuple[float, float], runs: pd.DataFrame, samples: int, seconds: float
) -> LevelCell:
    at_best, at_fastest = (rows_at(level.rows(runs), arm=arm, lr=lr) for lr in rates)
    return LevelCell(arm, level, *rates, at_best, at_fastest, min(level.batch_size, samples), seconds)


def _entry(cell: LevelCell | None, level: Level, arm: str, factors: Factors) -> dict[str, Any]:
    """Return one entry of `cells` in summary.json; an arm that cannot train at the level has no results."""
    entry: dict[str, Any] = {
        "factor": level.factor, "level": level.name, "arm": arm, "batch_size": level.batch_size,
        "optimizer": level.optimizer, "weight_decay": level.weight_decay, "updates": level.steps,
        "impossible": factors.impossible.get((level, arm)),
    }  # fmt: skip
    if cell is None:
        return entry
    best = cell.at_best[cell.at_best["purpose"] == "measure"]
    steps = cell.measured["steps_to_target"].where(~cell.measured["diverged"].astype(bool)).fillna(math.inf)
    middle = float(np.median(steps)) if len(steps) else math.inf
    costs = {unit: cell.cost(unit) for unit in UNITS}
    return entry | {
        "batch": cell.batch,
        "lr": cell.lr,
        "fastest_lr": cell.fastest_lr,
        "grid": [level.lrs[0], level.lrs[-1]],
        "runs": len(best),
        "diverged": int(best["diverged"].sum()),
        **{f"{part}_accuracy": finite_or_none(best[f"{part}_accuracy"].mean()) for part in ("val", "test")},
        "test_half_width": student_half_width(best["test_accuracy"]),
        "reached": int(np.isfinite(steps).sum()),
        "runs_at_fastest": len(steps),
        **{f"{unit}_to_target": finite_or_none(middle * cost) for unit, cost in costs.items()},
        "seconds_per_update": cell.seconds,
    }


def _claims(
    plan: StudyPlan, factors: Factors, cells: Mapping[tuple[Level, str], LevelCell], target: float | None
) -> dict[str, dict[str, Any]]:
    """Return the claims by name: each a claim as JSON types, with what it compares."""
    found: dict[str, dict[str, Any]] = {}

    def add(claim: Claim, level: Level, measure: str, arm: str, **against: str) -> None:
        where = {"factor": level.factor, "level": level.name, "arm": arm, "measure": measure, **against}
        found[f"{level.factor}={level.name} {arm} {measure} against {next(iter(against.values()))}"] = {
            **claim.to_json(),
            **where,
        }

    own = (plan.batch_size, plan.optimizer)
    for level in factors.levels:
        same = factors.batch_sizes if level in factors.batch_sizes else factors.optimizers
        other = next(lv for lv in same if (lv.batch_size, lv.optimizer) == own)
        first, last = (cells.get((level, arm)) for arm in (plan.arms[0], plan.arms[-1]))
        if first and last:
            claim = _accuracy(first, last, f"with {last.arm}", f"with {first.arm}")
            add(claim, level, "accuracy", last.arm, against_arm=first.arm)
        for arm in plan.arms if level is not other else ():
            if (level, arm) in cells:
                old, new = cells[other, arm], cells[level, arm]
                claim = _accuracy(old, new, level.where, other.where)
                add(claim, level, "accuracy", arm, against_level=other.name)
                for unit in UNITS:
                    add(_to_target(old, new, unit, target), level, unit, arm, against_level=other.name)
    return found


def _accuracy(old: LevelCell, new: LevelCell, compared: str, baseline: str) -> Claim:
    """Return the claim how many points of test accuracy `new` is over `old`, each at its best rate."""
    step = 100 * accuracy_step(pd.concat([cell.at_best for cell in (old, new)]), "test_accuracy")
    samples = [sample_of(100 * cell.at_best["test_accuracy"], cell.at_best["purpose"], step) for cell in (old, new)]
    return claim_difference(
        samples,
        "points",
        "fewer than two seeds measured a level",
        lambda interval: wording.level_accuracy(interval, samples[0].mean, samples[1].mean, compared, baseline),
    )


def _to_target(old: LevelCell, new: LevelCell, unit: str, target: float | None) -> Claim:
    """Return the claim how many times as much of the unit as `old` the level `new` takes to the target.

    Both are at their fastest rate. Samples and seconds are updates times the cost of one update, so one interval serves
    all three units.
    """
    samples = [old.octaves(), new.octaves()]
    hidden = (samples[0].hidden, samples[1].hidden)
    n = min(len(sample.seen) + sample.hidden for sample in samples)
    costs = [cell.cost(unit) for cell in (old, new)]
    goal = wording.percent(target) if target is not None else "the target"
    octaves = censored_difference(samples[1], samples[0]) if target is not None and n >= 2 else None
    if octaves is None or math.isnan(octaves.estimate):
        why = f"too few of the {n} runs reach {goal} to tell"
        return unclaimed(1, "times", why, n, sum(hidden))
    price = costs[1] / costs[0]
    ratio = Interval(*(price * power_of_two(x) for x in (octaves.estimate, octaves.low, octaves.high)))
    text = wording.level_ratio(ratio, unit, goal, new.level.words, old.level.words, hidden)
    return make_claim(ratio, 1, False, "times", n, sum(hidden), text)
