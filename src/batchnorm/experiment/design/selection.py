"""Choosing each arm's rate and setting so that chance alone does not choose differently for two arms.

The best of several noisy means is often not the best setting. If two arms that are the same network were each
given their luckiest setting, they would be measured at different settings and would then truly differ. So a
setting counts as an arm's best unless the choosing seeds rule it out, and where two arms share such a setting,
they share it.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
# The levels of the other settings at which learning rates are compared.
BASE: Mapping[str, Any] = {"weight_decay": 0, "dropout": 0}
# A setting that is worse than the best by more than this is left out: its noise is of another kind.
_CONTEST = 0.05  # share of accuracy
_CONTEST_OCTAVES = 1.0  # of steps to the target

Setting = TypeVar("Setting", bound=Hashable)
Scores = Mapping[Setting, Sequence[float]]


def contenders(scores: Scores[Setting], level: float = LEVEL, contest: float = _CONTEST) -> set[Setting]:
    """Return the settings that may be the best: those whose mean is within a margin of the largest mean.

    margin = t(1 − (1 − level)/(k − 1); k(C − 1)) · s · √(2/C) for k settings of C seeds with pooled standard
    deviation s: the subset holds the truly best setting with probability `level` (Gupta 1965, with
    Bonferroni's bound for the critical value). With one seed there is no margin and only the largest mean contends.

    Args:
        scores: the scores of each setting, one a seed; larger is better.
        level: the probability that the truly best setting is returned.
        contest: settings whose mean is worse than the largest by more than this do not take part.
    """
    means = {setting: float(np.mean(values)) for setting, values in scores.items()}
    top = max(means.values())
    close = [setting for setting, mean in means.items() if mean >= top - contest]
    dof = sum(len(scores[setting]) - 1 for setting in close)
    if dof < 1 or len(close) == 1:
        return {setting for setting in close if means[setting] == top}
    squares = sum(float(np.var(scores[setting])) * len(scores[setting]) for setting in close)
    seeds = min(len(scores[setting]) for setting in close)
    t = float(stats.t.ppf(1 - (1 - level) / (len(close) - 1), dof))
    margin = t * np.sqrt(squares / dof * 2 / seeds)
    return {setting for setting in close if means[setting] >= top - margin}


def choose_together(
    scores: Mapping[str, Scores[Setting]],
    level: float = LEVEL,
    contest: float = _CONTEST,
    also: Mapping[str, Scores[Setting]] | None = None,
) -> dict[str, Setting]:
    """Return the best setting of each arm; arms share a setting where the choosing seeds allow it.

    A setting that contends by the scores in `also` contends too, but `scores` alone decide which one wins.

    The first and the last arm, which are compared, are settled first. Every other arm takes a setting that is taken
    already if it contends there. Among several settings the one with the largest mean over the arms concerned wins,
    then the first in the order of `scores`.
    """
    near = {arm: contenders(own, level, contest) for arm, own in scores.items()}
    for arm, own in (also or {}).items():
        near[arm] |= contenders(own, level, contest) if own else set()
    arms = list(scores)
    chosen: dict[str, Setting] = {}

    def take(group: list[str], among: set[Setting]) -> None:
        order = [setting for setting in scores[group[0]] if setting in among]
        best = max(order, key=lambda s: sum(float(np.mean(scores[arm][s])) for arm in group))
        chosen.update(dict.fromkeys(group, best))

    shared = near[arms[0]] & near[arms[-1]]
    if shared:
        take([arms[0], arms[-1]], shared)
    else:
        take([arms[0]], near[arms[0]])
        take([arms[-1]], near[arms[-1]])
    for arm in arms[1:-1]:
        take([arm], near[arm] & set(chosen.values()) or near[arm])
    return {arm: chosen[arm] for arm in arms}


def rows_at(runs: pd.DataFrame, **setting: Any) -> pd.DataFrame:
    """Return the rows whose columns hold these values: floats to a millionth, all else exactly; None fits nothing."""
    wanted = np.ones(len(runs), bool)
    for column, value in setting.items():
        if isinstance(value, float):
            wanted &= np.isclose(runs[column].to_numpy(float), value, rtol=1e-6, atol=0)
        else:
            wanted &= (runs[column] == value).to_numpy(bool)
    return runs[wanted]


def _scores(runs: pd.DataFrame, arm: str, keys: list[str], column: str = "val_accuracy") -> Scores[tuple[float, ...]]:
    rows = rows_at(runs, purpose="choose", arm=arm)
    return {setting: group[column].tolist() for setting, group in rows.groupby(keys, sort=True)}


def choose_rates(runs: pd.DataFrame, arms: Sequence[str], base: Mapping[str, Any] = BASE) -> dict[str, float]:
    """Return the learning rate of each arm, from the `choose` rows at the base of all other settings.

    `runs` has the columns of runs.csv; `arms` in the order of the study, the first and the last compared.
    """
    rows = rows_at(runs, **base)
    chosen = choose_together({arm: _scores(rows, arm, ["lr"]) for arm in arms})
    return {arm: float(setting[0]) for arm, setting in chosen.items()}


def choose_fastest(runs: pd.DataFrame, arms: Sequence[str], base: Mapping[str, Any] = BASE) -> dict[str, float]:
    """Return the learning rate at which each arm is soonest at the target, from the same rows' `steps_to_target`.

    Scored in octaves of steps. A run that never arrives counts as arriving after twice the budget: which rate is
    chosen need not be unbiased, what is measured there is. But a rate also contends by the runs that do arrive:
    where one run in six is lost, one of two arms often loses one of its two choosing runs there and the other arm
    none, and the price of that run alone would send two equal arms to different rates.
    """
    rows = rows_at(runs, **base)
    never = 2.0 * rows["steps"]
    late = rows["diverged"].astype(bool) | rows["steps_to_target"].isna()
    steps = rows["steps_to_target"].where(~late, never).clip(lower=1)
    octaves = rows.assign(octaves=-np.log2(steps.astype(float)))
    everyone, arrived = (
        {arm: _scores(some, arm, ["lr"], "octaves") for arm in arms} for some in (octaves, octaves[~late])
    )
    chosen = choose_together(everyone, contest=_CONTEST_OCTAVES, also=arrived)
    return {arm: float(setting[0]) for arm, setting in chosen.items()}


def choose_settings(
    runs: pd.DataFrame, arms: Sequence[str], base: Mapping[str, Any] = BASE
) -> dict[str, dict[str, Any]]:
    """Return the chosen setting of each arm among all that were tried: "lr" and the names in `base`."""
    keys = ["lr", *base]
    chosen = choose_together({arm: _scores(runs, arm, keys) for arm in arms})
    return {arm: dict(zip(keys, setting, strict=True)) for arm, setting in chosen.items()}
