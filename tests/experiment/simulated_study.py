"""Studies drawn from known laws, for measuring how often a claim is wrong: no network is trained.

A `Law` is one arm's truth. Accuracies lie on the lattice of 360 samples, noise has Student's tails, rates past a
cliff diverge in some seeds and not in others, steps to the target fall with the rate and are censored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from batchnorm.experiment.claims import Claim, compute_claims
from batchnorm.experiment.selection import choose_rates, choose_settings

ARMS = ("first", "last")
RATES = 10.0 ** np.arange(-2, 2.1, 0.5)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
DROPOUTS = (0.0, 0.1, 0.25, 0.5)
CHANCE, SAMPLES, BUDGET = 0.1, 360, 1500
Select = Callable[[pd.DataFrame, tuple[str, ...]], dict[str, Any]]


@dataclass(frozen=True)
class Law:
    """`best` and `width`: where the plateau of rates lies, in decades; `speed`: octaves of steps saved."""

    top: float = 0.97
    noise: float = 0.004
    best: float = 0.0
    width: float = 1.2
    cliff: float = 1.2
    speed: float = 0.0
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

    octaves = 8.5 - law.speed - 1.5 * np.log10(lr) + 0.25 * rng.standard_t(4, len(grid))
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
            "steps_to_target": 2.0**octaves,
            "drift": law.drift * lr**0.2 * np.exp(0.3 * rng.standard_t(4, len(grid))),
            "diverged": diverged,
        }
    )


def draw_study(
    rng: np.random.Generator, laws: tuple[Law, Law], seeds: int, choose_seeds: int = 2, rates: Select = choose_rates
) -> pd.DataFrame:
    """The runs of a whole study: both waves, and the steps to the target that the first arm sets."""
    names = [("choose", 1001 + i) for i in range(choose_seeds)] + [("measure", 1 + i) for i in range(seeds)]
    waves = [_rows(rng, arm, law, _settings(None), names) for arm, law in zip(ARMS, laws, strict=True)]
    best = rates(pd.concat(waves), ARMS)
    waves += [_rows(rng, arm, law, _settings(best[arm]), names) for arm, law in zip(ARMS, laws, strict=True)]
    runs = pd.concat(waves, ignore_index=True)
    setter = (runs["arm"] == ARMS[0]) & (runs["purpose"] == "choose") & (runs["lr"] == best[ARMS[0]])
    base = (runs["weight_decay"] == 0) & (runs["dropout"] == 0)
    target = runs.loc[setter & base, "val_accuracy"].median()
    reached = (runs["val_accuracy"] >= target) & (runs["steps_to_target"] <= BUDGET)
    runs["steps_to_target"] = runs["steps_to_target"].where(reached)
    return runs


def claims_of(runs: pd.DataFrame, rates: Select = choose_rates, settings: Select = choose_settings) -> dict[str, Claim]:
    """The claims of a drawn study, its settings chosen as the study chooses them."""
    best, chosen = rates(runs, ARMS), settings(runs, ARMS)
    table = {arm: {"best_lr": best[arm], **chosen[arm]} for arm in ARMS}
    return compute_claims(runs, table, baseline=ARMS[0], compared=ARMS[1], budget=BUDGET, chance=CHANCE)


def luckiest_rates(runs: pd.DataFrame, arms: tuple[str, ...]) -> dict[str, float]:
    """What a study must not do: every arm's largest mean, however narrowly it won."""
    base = runs[(runs["weight_decay"] == 0) & (runs["dropout"] == 0)]
    return {arm: setting["lr"] for arm, setting in luckiest_settings(base, arms).items()}


def luckiest_settings(runs: pd.DataFrame, arms: tuple[str, ...]) -> dict[str, dict[str, float]]:
    keys = ["lr", "weight_decay", "dropout"]
    rows = runs[runs["purpose"] == "choose"]
    means = {arm: rows[rows["arm"] == arm].groupby(keys)["val_accuracy"].mean() for arm in arms}
    return {arm: dict(zip(keys, mean.idxmax(), strict=True)) for arm, mean in means.items()}
