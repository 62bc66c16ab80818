"""The six claims of a study: each an estimate with a 95 % interval over seeds, a unit, a verdict, and its words.

Estimators, sources, and when each misleads: docs/study.md.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from ..design.selection import BASE, choose_together, rows_at
from . import wording
from .intervals import (
    LEVEL,
    CensoredSample,
    Interval,
    Sample,
    censored_difference,
    finite_or_none,
    welch,
)
from .measures import decades_within, reaches_grid_end
from .metric import ACCURACY, Metric

# In octaves. Steps to the target are interpolated between evaluations that are about a quarter of an octave from each
# other. Seeds that agree more closely than a fifth of that agree by chance.
STEP_FLOOR = 0.05
# Natural logarithm. Percentiles are stored to five digits, so their drift is not known to better than a percent.
_DRIFT_RESOLUTION = 0.02

NOT_MEASURABLE = "not measurable"
Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One answer of a study.

    `estimate` and the limits are in `unit`; a limit of None is an open side. `null` is the value of no effect;
    `verdict` is "no difference" exactly when the interval holds it, else "better" or "worse" for the compared arm.
    Where the runs allow no claim it is "not measurable": estimate and limits are None, and `reason` says why. `n` is
    the number of measuring seeds in the smaller arm, `censored` the number of runs known only to lie beyond a limit.
    """

    estimate: float | None
    null: float
    ci_low: float | None
    ci_high: float | None
    unit: str
    verdict: str
    n: int
    censored: int
    text: str
    reason: str | None = None

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the claim as JSON types; no number in it is NaN or infinite."""
        return asdict(self)


@dataclass(frozen=True)
class StudyRows:
    """The rows that the estimators ask for, with scores of `metric`.

    `settings` may hold arms besides the two compared. `base` has the level of every factor but the learning rate at
    which the other factors are varied. `tested` tells whether `test_accuracy` comes from data of their own.
    `unlearnt` has, for each arm that learns nothing above chance, a clause that says so; `no_target` says why there is
    no target, `held` why a factor was not varied. `level` is that of the intervals.
    """

    runs: pd.DataFrame
    settings: Mapping[str, Setting]
    baseline: str
    compared: str
    budget: int
    target: float | None
    chance: float
    metric: Metric = ACCURACY
    base: Setting = field(default_factory=lambda: BASE)
    tested: bool = True
    unlearnt: Mapping[str, str] = field(default_factory=dict)
    no_target: str | None = None
    held: Mapping[str, str] = field(default_factory=dict)
    level: float = LEVEL

    @property
    def arms(self) -> tuple[str, str]:
        return self.baseline, self.compared

    def rows(self, arm: str, **fixed: Any) -> pd.DataFrame:
        """Return the rows of an arm whose named columns equal the given values."""
        return rows_at(self.runs, arm=arm, **fixed)

    def over(self, arm: str, factor: str) -> pd.DataFrame:
        """Return the rows of an arm that differ in one factor, at its best rate and the base of the other factors."""
        fixed = {"lr": self.settings[arm]["best_lr"], **self.base}
        return self.rows(arm, **{name: value for name, value in fixed.items() if name != factor})

    def at_best_rate(self, arm: str) -> pd.DataFrame:
        return self.rows(arm, lr=self.settings[arm]["best_lr"], **self.base)

    def at_fastest_rate(self, arm: str) -> pd.DataFrame:
        rate = self.settings[arm].get("fastest_lr", self.settings[arm]["best_lr"])
        return self.rows(arm, lr=rate, **self.base)

    def at_chosen_setting(self, arm: str) -> pd.DataFrame:
        return self.rows(arm, **{key: self.settings[arm][key] for key in ("lr", *self.base)})

    def locating(self, arm: str, rows: pd.DataFrame) -> pd.Series:
        """Return the purposes of the rows; where an arm has one setting alone, no seed chose and all measure."""
        return rows["purpose"].replace("choose", "measure") if len(rows) == len(self.rows(arm)) else rows["purpose"]

    def table(self, rows: pd.DataFrame, factor: str) -> pd.DataFrame:
        """Return the validation accuracy, one row a seed and one column a level, of complete seeds only."""
        wide = rows.set_index(["purpose", "seed", factor])["val_accuracy"].unstack(factor)
        return wide.dropna(axis=0).sort_index(axis=1)


def accuracy_step(runs: pd.DataFrame, column: str) -> float:
    """Return the step between two possible accuracies, one over the number of samples: the smallest gap of two runs."""
    # A diverged run counts as the share of one class, which is no multiple of that step.
    trained = runs.loc[~runs["diverged"].to_numpy(bool), column].dropna()
    gaps = np.diff(np.unique(trained.to_numpy(float).round(9)))
    return float(gaps.min()) if len(gaps) else 0.0


def sample_of(values: ArrayLike, purposes: ArrayLike, resolution: float) -> Sample:
    """Return a sample with one value a seed, NaN left out.

    The measuring seeds locate the arm. The choosing seeds add only what they tell about the spread.
    """
    numbers, names = np.asarray(values, dtype=np.float64), np.asarray(purposes)
    known = np.isfinite(numbers)
    measured, chose = (numbers[known & (names == purpose)] for purpose in ("measure", "choose"))
    return Sample(measured, (chose,), resolution)


def _judge(interval: Interval, null: float, larger_is_better: bool) -> str:
    if not (interval.low > null or interval.high < null):
        return "no difference"
    return "better" if (interval.low > null) == larger_is_better else "worse"


def make_claim(
    interval: Interval, null: float, larger_is_better: bool, unit: str, n: int, censored: int, text: str
) -> Claim:
    estimate, low, high = (finite_or_none(value) for value in (interval.estimate, interval.low, interval.high))
    verdict = _judge(interval, null, larger_is_better)
    return Claim(estimate, null, low, high, unit, verdict, n, censored, text)


def unclaimed(null: float, unit: str, why: str, n: int = 0, censored: int = 0) -> Claim:
    return Claim(None, null, None, None, unit, NOT_MEASURABLE, n, censored, f"no claim: {why}", why)


def claim_difference(
    samples: Sequence[Sample],
    unit: str,
    why_none: str,
    words: Callable[[Interval], str],
    *,
    larger_is_better: bool = True,
    censored: int = 0,
    level: float = LEVEL,
) -> Claim:
    """Return the claim on the difference of two arms' means.

    Args:
        samples: of the baseline and of the compared arm.
        why_none: the reason when the samples allow no interval.
        words: puts the interval into words.
    """
    n = min(len(sample.values) for sample in samples)
    interval = welch(samples[0], samples[1], level)
    if math.isnan(interval.estimate):
        return unclaimed(0, unit, why_none, n, censored)
    return make_claim(interval, 0, larger_is_better, unit, n, censored, words(interval))


def octaves_to_target(rows: pd.DataFrame, budget: int) -> CensoredSample:
    """Return log2 of the steps to the target of the measuring seeds.

    A run that diverges, or does not reach the target within the budget, is known only to lie beyond the budget.
    """
    measured = rows[rows["purpose"] == "measure"]
    steps = measured["steps_to_target"].to_numpy(float)
    reached = np.isfinite(steps) & (steps <= budget) & ~measured["diverged"].to_numpy(bool)
    limit = math.log2(max(budget, 1))
    return CensoredSample(np.log2(np.maximum(steps[reached], 1)), int(np.sum(~reached)), limit, STEP_FLOOR)


def power_of_two(octaves: float) -> float:
    # A ratio beyond 2^60 says only that this side of the interval is open.
    return 2.0**octaves if abs(octaves) < 60 else math.inf if octaves > 0 else 0.0


def convergence_claim(study: StudyRows) -> Claim:
    if missing := study.unlearnt.get(study.baseline) or study.no_target:
        return unclaimed(1, "times", f"no target, {missing}")
    first, second = (octaves_to_target(study.at_fastest_rate(arm), study.budget) for arm in study.arms)
    n = min(len(arm.seen) + arm.hidden for arm in (first, second))
    hidden = (first.hidden, second.hidden)
    target = study.metric.words(study.target) if study.target is not None else "the target"
    if n < 2:
        return unclaimed(1, "times", "fewer than two seeds measured an arm at its best rate", n, sum(hidden))
    octaves = censored_difference(first, second, study.level)
    if math.isnan(octaves.estimate):
        why = wording.too_few_arrivals(target, study.arms, hidden, n, study.budget)
        return unclaimed(1, "times", why, n, sum(hidden))
    ratio = Interval(*(power_of_two(x) for x in (octaves.estimate, octaves.low, octaves.high)))
    text = wording.convergence(ratio, target, study.arms, hidden, study.budget)
    return make_claim(ratio, 1, True, "times", n, sum(hidden), text)


def _learning_rate(study: StudyRows) -> Claim:
    samples, cut = [], 0
    for arm in study.arms:
        table = study.table(study.over(arm, "lr"), "lr")
        rates = table.columns.to_numpy(float)
        if len(rates) < 2 or len(table) < 2:
            return unclaimed(0, "decades", f"{arm} has {_levels_of(rates, 'learning rate')}, it takes two of each")
        purposes = table.index.get_level_values("purpose")
        widths = [decades_within(rates, row, study.chance) for row in table.to_numpy()]
        cut += sum(reaches_grid_end(row) for row in table.to_numpy()[purposes == "measure"])
        # Between two rates the curve is interpolated: where it falls steeply is known only to one step of the grid.
        samples.append(sample_of(widths, purposes, float(np.diff(np.log10(rates)).max())))
    seeds = sum(len(sample.values) for sample in samples)
    return claim_difference(
        samples,
        "decades",
        "fewer than two seeds measured an arm at every rate",
        lambda interval: wording.learning_rate(interval, samples[0].mean, samples[1].mean, cut, seeds),
        censored=cut,
        level=study.level,
    )


def _levels_of(values: Sized, factor: str) -> str:
    """Return what a grid lacks: a second value, or seeds that ran at every value."""
    counted = {0: "no value", 1: "one value"}.get(len(values))
    return f"{counted} of {factor}" if counted else f"too few seeds that ran at every {factor}"


def _levels(tables: Mapping[str, pd.DataFrame], sign: int) -> dict[str, Hashable]:
    """Return the best (`sign` 1) or worst (−1) level of each arm, by the choosing seeds.

    Two arms share a level where the choosing seeds cannot tell which is better.

    The measuring seeds have no part in the choice: levels that are chosen by the same values that are compared
    afterwards would show a spread where there is only noise.
    """
    return choose_together({arm: (sign * table.xs("choose")).to_dict("list") for arm, table in tables.items()})


def _spread(study: StudyRows, factor: str) -> Claim:
    tables, words, scale = {}, factor.replace("_", " "), study.metric.scale
    if why := study.held.get(factor):
        return unclaimed(0, study.metric.unit, why)
    for arm in study.arms:
        table = study.table(study.over(arm, factor), factor)
        if table.shape[1] < 2 or {"choose", "measure"} - set(table.index.get_level_values("purpose")):
            why = f"{arm} has {_levels_of(table.columns, words)}, it takes two, each with choosing and measuring seeds"
            return unclaimed(0, study.metric.unit, why)
        tables[arm] = table
    best, worst = _levels(tables, 1), _levels(tables, -1)
    step = scale * accuracy_step(study.runs, "val_accuracy")
    samples = [
        sample_of(scale * (table[best[arm]] - table[worst[arm]]), table.index.get_level_values("purpose"), step)
        for arm, table in tables.items()
    ]
    name = factor.replace("_", "-")
    return claim_difference(
        samples,
        study.metric.unit,
        "fewer than two seeds measured an arm at every setting",
        lambda interval: wording.spread(interval, samples[0].mean, samples[1].mean, name, study.metric),
        larger_is_better=False,
        level=study.level,
    )


def _generalization(study: StudyRows) -> Claim:
    metric, part = study.metric, "test" if study.tested else "last validation"
    step = metric.scale * accuracy_step(study.runs, "test_accuracy")
    rows = [study.at_chosen_setting(arm) for arm in study.arms]
    samples = [
        sample_of(metric.scale * chosen["test_accuracy"], study.locating(arm, chosen), step)
        for arm, chosen in zip(study.arms, rows, strict=True)
    ]
    return claim_difference(
        samples,
        metric.unit,
        "fewer than two seeds measured an arm at its chosen setting",
        lambda interval: wording.generalization(
            interval, samples[0].mean / metric.scale, samples[1].mean / metric.scale, metric, part
        ),
        level=study.level,
    )


def _drift(study: StudyRows) -> Claim:
    rows = [study.at_best_rate(arm) for arm in study.arms]
    drifts = [arm["drift"].astype(float).where(lambda drift: drift > 0) for arm in rows]
    samples = [
        sample_of(np.log(drift), arm["purpose"], _DRIFT_RESOLUTION) for drift, arm in zip(drifts, rows, strict=True)
    ]
    n = min(len(sample.values) for sample in samples)
    lost = sum(int((arm["purpose"] == "measure").sum()) for arm in rows) - sum(len(s.values) for s in samples)
    logs = welch(samples[0], samples[1], study.level)
    if math.isnan(logs.estimate):
        return unclaimed(1, "times", "fewer than two runs of an arm have percentiles that move", n, lost)
    ratio = Interval(*(power_of_two(x / math.log(2)) for x in (logs.estimate, logs.low, logs.high)))
    text = wording.drift(ratio, math.exp(samples[0].mean), math.exp(samples[1].mean), lost)
    return make_claim(ratio, 1, False, "times", n, lost, text)


@dataclass(frozen=True)
class Estimator:
    """How one claim is estimated, its value of no effect, whether more is better, and its unit; None = the metric's."""

    estimate: Callable[[StudyRows], Claim]
    null: float
    larger_is_better: bool
    unit: str | None = None

    def claim(self, study: StudyRows) -> Claim:
        """Return the claim; nothing can be told of two arms of which neither learns anything."""
        clauses = [study.unlearnt[arm] for arm in study.arms if arm in study.unlearnt]
        if len(clauses) == len(study.arms):
            return unclaimed(self.null, self.unit or study.metric.unit, "; ".join(clauses))
        return self.estimate(study)


ESTIMATORS = {
    "convergence": Estimator(convergence_claim, 1, True, "times"),
    "learning_rate": Estimator(_learning_rate, 0, True, "decades"),
    "weight_decay": Estimator(lambda study: _spread(study, "weight_decay"), 0, False),
    "dropout": Estimator(lambda study: _spread(study, "dropout"), 0, False),
    "generalization": Estimator(_generalization, 0, True),
    "drift": Estimator(_drift, 1, False, "times"),
}


def compute_claims(
    runs: pd.DataFrame,
    settings: Mapping[str, Setting],
    *,
    baseline: str,
    compared: str,
    budget: int,
    target: float | None = None,
    chance: float | None = None,
    **options: Any,
) -> dict[str, Claim]:
    """Return the claims of a study, `compared` judged against `baseline`.

    Args:
        runs: a row a training run, with the columns of runs.csv. NaN in `steps_to_target` = not reached.
        settings: for each arm its "best_lr" and its chosen "lr", "weight_decay" and "dropout".
        baseline: the arm that sets the target.
        compared: the arm judged.
        budget: the steps every run was given.
        target: the score that `steps_to_target` refers to; without it the texts leave it out.
        chance: the score of guessing; without it that of a diverged run, which is recorded as such.
        **options: the other fields of `StudyRows`.

    Raises:
        KeyError: an arm without a setting, or a column missing.
    """
    if chance is None:
        lost = runs.loc[runs["diverged"].to_numpy(bool), "val_accuracy"].dropna()
        chance = float(lost.min()) if len(lost) else 0.0
    study = StudyRows(runs, settings, baseline, compared, budget, target, chance, **options)
    return {name: estimator.claim(study) for name, estimator in ESTIMATORS.items()}
