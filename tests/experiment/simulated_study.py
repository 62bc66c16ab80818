"""Studies drawn from known laws, for measuring how often a claim is wrong: no network is trained.

A `Law` is one arm's truth. Accuracies lie on the lattice of 360 samples, noise has Student's tails, rates past a
cliff diverge in some seeds and not in others. A run learns along an exponential curve to its own final accuracy, in
a time that bends around a fastest rate; its steps to the target, from that curve, are censored at the budget.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from batchnorm.experiment.analysis.claims import Claim, StudyRows, compute_claims, convergence_claim
from batchnorm.experiment.analysis.target import (
    target_accuracy,  # the study's own rule: a copy of it here could fall behind
)
from batchnorm.experiment.design.selection import choose_fastest, choose_rates, choose_settings

ARMS = ("first", "last")
RATES = 10.0 ** np.arange(-2, 2.1, 0.5)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
DROPOUTS = (0.0, 0.1, 0.25, 0.5)
CHANCE, SAMPLES, BUDGET = 0.1, 360, 1500
Select = Callable[[pd.DataFrame, tuple[str, ...]], dict[str, Any]]


@dataclass(frozen=True)
class Law:
    """`best` and `width`: where the plateau of rates lies, in decades; `speed`: octaves of steps saved.

    At `fast`, in decades, a run learns soonest; it takes `bend` octaves more a squared decade away from there, and
    `spread` is the standard deviation over seeds in octaves. Half of the runs diverge at `cliff`.
    """

    top: float = 0.97
    noise: float = 0.004
    best: float = 0.0
    width: float = 1.2
    cliff: float = 1.2
    speed: float = 0.0
    fast: float = 0.5
    bend: float = 1.5
    spread: float = 0.3
    decay_at: float = 2.0
    dropout_cost: float = 0.05
    drift: float = 0.5


def _mean_accuracy(law: Law, lr: np.ndarray, decay: np.ndarray, dropout: np.ndarray) -> np.ndarray:
    low = np.maximum(0, law.best - law.width / 2 - np.log10(lr))
    loss = 0.05 * low**2 + 0.004 * np.abs(np.log10(lr) - law.best) + law.dropout_cost * dropout**2
    # Weight decay shrinks by rate times decay a step; it hurts where that is no longer small.
    share = 1 / (1 + (10**law.decay_at * lr * decay) ** 2)
    return CHANCE + (law.top - loss - CHANCE) * np.clip(share, 0, 1)


def _settings(best: float | None) -> np.ndarray:
    if best is None:
        return np.array([(lr, 0.0, 0.0) for lr in RATES])
    return np.array([(best, d, 0.0) for d in DECAYS[1:]] + [(best, 0.0, d) for d in DROPOUTS[1:]])


def _rows(
    rng: np.random.Generator, arm: str, law: Law, settings: np.ndarray, seeds: list[tuple[str, int]]
) -> pd.DataFrame:
    grid = np.repeat(settings, len(seeds), axis=0)
    lr, decay, dropout = grid.T
    mean = _mean_accuracy(law, lr, decay, dropout)
    diverged = rng.random(len(grid)) < 1 / (1 + np.exp(-(np.log10(lr) - law.cliff) / 0.12))

    def measured() -> np.ndarray:
        noisy = mean + law.noise * rng.standard_t(4, len(grid))
        return np.where(diverged, CHANCE, np.round(np.clip(noisy, 0, 1) * SAMPLES) / SAMPLES)

    # Student's law with 4 degrees has a variance of 2.
    late = law.bend * (np.log10(lr) - law.fast) ** 2 + law.spread / 2**0.5 * rng.standard_t(4, len(grid))
    return pd.DataFrame(
        {
            "arm": arm,
            "purpose": [p for p, _ in seeds] * len(settings),
            "seed": [s for _, s in seeds] * len(settings),
            "lr": lr,
            "weight_decay": decay,
            "dropout": dropout,
            "val_accuracy": measured(),
            "test_accuracy": measured(),
            "half_life": 2.0 ** (5.5 - law.speed + late),
            "drift": law.drift * lr**0.2 * np.exp(0.3 * rng.standard_t(4, len(grid))),
            "diverged": diverged,
        }
    )


def draw_rates(
    rng: np.random.Generator, laws: tuple[Law, Law], seeds: int, choose_seeds: int = 2, rates: Select = choose_rates
) -> pd.DataFrame:
    """A study's first wave, all that convergence rests on, with the steps to the target that the first arm sets."""
    names = _seeds(seeds, choose_seeds)
    runs = pd.concat([_rows(rng, arm, law, _settings(None), names) for arm, law in zip(ARMS, laws, strict=True)])
    return _with_steps(runs, rates(runs, ARMS)[ARMS[0]])


def draw_study(
    rng: np.random.Generator, laws: tuple[Law, Law], seeds: int, choose_seeds: int = 2, rates: Select = choose_rates
) -> pd.DataFrame:
    """The runs of a whole study: both waves."""
    runs = draw_rates(rng, laws, seeds, choose_seeds, rates)
    best, names = rates(runs, ARMS), _seeds(seeds, choose_seeds)
    waves = [_rows(rng, arm, law, _settings(best[arm]), names) for arm, law in zip(ARMS, laws, strict=True)]
    return _with_steps(pd.concat([runs, *waves], ignore_index=True), best[ARMS[0]])


def _seeds(measure: int, choose: int) -> list[tuple[str, int]]:
    return [("choose", 1001 + i) for i in range(choose)] + [("measure", 1 + i) for i in range(measure)]


def _with_steps(runs: pd.DataFrame, best_lr: float) -> pd.DataFrame:
    """The runs with the steps at which their curves pass the target, as in a study with `SAMPLES` for validation."""
    data = SimpleNamespace(chance=lambda part: CHANCE, y={"validation": range(SAMPLES)})
    columns = ["arm", "purpose", "lr", "weight_decay", "dropout", "val_accuracy"]
    target = target_accuracy(SimpleNamespace(arms=ARMS), runs[columns].to_dict("records"), best_lr, data)
    if target is None:
        return runs.assign(steps=BUDGET, steps_to_target=np.nan)
    final = runs["val_accuracy"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = runs["half_life"].to_numpy() * np.log2((final - CHANCE) / (final - target))
    return runs.assign(steps=BUDGET, steps_to_target=np.where((final >= target) & (steps <= BUDGET), steps, np.nan))


def claims_of(runs: pd.DataFrame, rates: Select = choose_rates, settings: Select = choose_settings) -> dict[str, Claim]:
    """The claims of a drawn study, its settings chosen as the study chooses them."""
    best, fastest, chosen = rates(runs, ARMS), choose_fastest(runs, ARMS), settings(runs, ARMS)
    table = {arm: {"best_lr": best[arm], "fastest_lr": fastest[arm], **chosen[arm]} for arm in ARMS}
    return compute_claims(runs, table, baseline=ARMS[0], compared=ARMS[1], budget=BUDGET, chance=CHANCE)


def convergence_of(runs: pd.DataFrame, fastest: Select = choose_fastest) -> Claim:
    """The one claim that rests on the first wave alone, without the time that the other five would take."""
    table = {arm: {"best_lr": rate, "fastest_lr": rate} for arm, rate in fastest(runs, ARMS).items()}
    return convergence_claim(StudyRows(runs, table, *ARMS, BUDGET, None, CHANCE))


def luckiest_rates(runs: pd.DataFrame, arms: tuple[str, ...]) -> dict[str, float]:
    """What a study must not do: every arm's largest mean, however narrowly it won."""
    base = runs[(runs["weight_decay"] == 0) & (runs["dropout"] == 0)]
    return {arm: setting["lr"] for arm, setting in luckiest_settings(base, arms).items()}


def luckiest_settings(runs: pd.DataFrame, arms: tuple[str, ...]) -> dict[str, dict[str, float]]:
    keys = ["lr", "weight_decay", "dropout"]
    rows = runs[runs["purpose"] == "choose"]
    means = {arm: rows[rows["arm"] == arm].groupby(keys)["val_accuracy"].mean() for arm in arms}
    return {arm: dict(zip(keys, mean.idxmax(), strict=True)) for arm, mean in means.items()}


def luckiest_fastest(runs: pd.DataFrame, arms: tuple[str, ...]) -> dict[str, float]:
    """What a study must not do: every arm's soonest rate by the mean of octaves, a lost run at twice the budget."""
    rows = runs[(runs["purpose"] == "choose") & (runs["weight_decay"] == 0) & (runs["dropout"] == 0)]
    octaves = np.log2(rows["steps_to_target"].fillna(2 * BUDGET).clip(lower=1))
    means = octaves.groupby([rows["arm"], rows["lr"]]).mean()
    return {arm: means[arm].idxmin() for arm in arms}
