"""How often a claim is wrong: over drawn studies, over drawn samples, and over studies of networks really trained."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from batchnorm.experiment.analysis.intervals import CensoredSample, Interval, Sample, censored_difference, welch
from batchnorm.experiment.training.probe import drift_of_run

from .simulated_study import (
    ARMS,
    CHANCE,
    Law,
    claims_of,
    convergence_of,
    draw_rates,
    draw_study,
    luckiest_fastest,
    luckiest_rates,
)

# A right test fails once in 10,000 draws; the draws are fixed, so it does not fail at all.
RARE = 1e-4
Draw = Callable[[np.random.Generator, int], np.ndarray]
LAWS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy": lambda rng, n: rng.standard_t(3, n),
    "skewed": lambda rng, n: rng.exponential(size=n),
}


def _most(trials: int, level: float = 0.05) -> int:
    """The largest count of wrong verdicts that a claim right at `level` may show."""
    return int(stats.binom.ppf(1 - RARE, trials, level))


def _holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seeds", [2, 4, 8])
def test_same_law_on_a_lattice(law: str, seeds: int) -> None:
    rng, wrong, trials = np.random.default_rng(1), 0, 1000
    for _ in range(trials):
        # The standard deviation is under one lattice step, so that ties are common.
        arms = [np.round(0.7 * LAWS[law](rng, seeds + 2)) for _ in ARMS]
        samples = [Sample(values[2:], (values[:2],), resolution=1.0) for values in arms]
        wrong += not _holds(welch(*samples), 0.0)
    assert wrong <= _most(trials)


def _censor(values: np.ndarray, limit: float) -> CensoredSample:
    seen = values[values <= limit]
    return CensoredSample(seen, len(values) - len(seen), limit, 0.05)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seeds", [2, 4, 8])
@pytest.mark.parametrize("hidden", [0.0, 0.3, 0.6])
def test_same_law_censored(law: str, seeds: int, hidden: float) -> None:
    rng, trials = np.random.default_rng(2), 60
    limit = float(np.quantile(LAWS[law](rng, 20_000), 1 - hidden)) if hidden else np.inf
    wrong = 0
    for _ in range(trials):
        arms = [_censor(LAWS[law](rng, seeds), limit) for _ in ARMS]
        wrong += not _holds(censored_difference(*arms), 0.0)
    assert wrong <= _most(trials)


@pytest.mark.parametrize("hidden", [0.0, 0.3, 0.6])
def test_a_true_effect_is_covered_and_found(hidden: float) -> None:
    rng, trials, effect = np.random.default_rng(3), 100, 4.0
    limit = float(stats.norm.ppf(1 - hidden)) if hidden else np.inf
    drawn = [
        censored_difference(_censor(rng.normal(size=6), limit), _censor(rng.normal(size=6) - effect, limit))
        for _ in range(trials)
    ]
    assert sum(not _holds(interval, effect) for interval in drawn) <= _most(trials)
    assert sum(interval.low > 0 for interval in drawn) > 0.7 * trials


def test_drawn_studies_of_one_network_show_no_difference() -> None:
    rng, trials, wrong = np.random.default_rng(4), 60, Counter()
    for trial in range(trials):
        runs = draw_study(rng, (Law(), Law()), seeds=(2, 4, 8)[trial % 3])
        wrong.update(name for name, claim in claims_of(runs).items() if claim.verdict in ("better", "worse"))
    assert max(wrong.values(), default=0) <= _most(trials)


def test_taking_the_luckiest_rate_would_find_differences_where_there_are_none() -> None:
    # The reason for selection.py, and proof that the test above can fail.
    rng, trials, wrong = np.random.default_rng(5), 40, 0
    for _ in range(trials):
        runs = draw_study(rng, (Law(), Law()), seeds=8, rates=luckiest_rates)
        wrong += claims_of(runs, luckiest_rates)["weight_decay"].verdict in ("better", "worse")
    assert wrong > _most(trials)


def test_a_fastest_rate_that_loses_runs_does_not_part_two_arms_of_one_network() -> None:
    # One run in fourteen diverges at the fastest rate, and the next rate takes 1.5 octaves more: whether an arm lost
    # one of its two choosing runs there must not send the arms to different rates.
    law = Law(width=3, fast=1.0, bend=6, spread=0.2, cliff=1.3, speed=3)
    rng, trials, wrong, unlucky = np.random.default_rng(7), 80, 0, 0
    for _ in range(trials):
        runs = draw_rates(rng, (law, law), seeds=4)
        wrong += convergence_of(runs).verdict in ("better", "worse")
        unlucky += convergence_of(runs, luckiest_fastest).verdict in ("better", "worse")
    assert wrong <= _most(trials) < unlucky  # the second half proves that the first can fail


RATES, DECAYS, DROPOUTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (1e-3, 3e-2), (0.4,)
STEPS = (0, 5, 10, 20, 35, 50, 75, 100, 130, 160)


@pytest.fixture(scope="module")
def trained() -> pd.DataFrame:
    """Runs of one network on real digits: every setting under 32 seeds, all trained side by side as one batch.

    The weight-decay and dropout grids are run at every rate, so that a study drawn from it may choose any.
    """
    settings = [(lr, 0.0, 0.0) for lr in RATES]
    settings += [(lr, decay, 0.0) for lr in RATES for decay in DECAYS]
    settings += [(lr, 0.0, dropout) for lr in RATES for dropout in DROPOUTS]
    seeds = 32
    rows = [(*setting, seed) for setting in settings for seed in range(seeds)]
    table = pd.DataFrame(rows, columns=["lr", "weight_decay", "dropout", "seed"])
    return table.join(_train(*(torch.tensor(table[c].to_numpy(np.float32)) for c in table.columns[:3])))


def _train(lr: torch.Tensor, decay: torch.Tensor, dropout: torch.Tensor) -> pd.DataFrame:
    """One hidden layer of 12 sigmoid units a network, SGD with batches of 20, a network its own data order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[order])
    networks, generator = len(lr), torch.Generator().manual_seed(0)
    weights = [torch.randn(networks, a, b, generator=generator) / a**0.5 for a, b in ((64, 12), (12, 10))]
    weights += [torch.zeros(networks, 1, b) for b in (12, 10)]
    measured: dict[str, list[torch.Tensor]] = {"val_accuracy": [], "test_accuracy": [], "percentiles": []}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            _measure(weights, x, y, measured)
        chosen = torch.randint(900, (networks, 20), generator=generator)
        keep = (torch.rand(networks, 1, 12, generator=generator) >= dropout[:, None, None]) / (1 - dropout)[
            :, None, None
        ]
        inputs, hidden = x[chosen], torch.sigmoid(torch.baddbmm(weights[2], x[chosen], weights[0]))
        kept = hidden * keep
        error = torch.softmax(torch.baddbmm(weights[3], kept, weights[1]), 2)
        error = (error - torch.nn.functional.one_hot(y[chosen], 10)) / 20
        back = error @ weights[1].mT * keep * hidden * (1 - hidden)
        slopes = [inputs.mT @ back, kept.mT @ error, back.sum(1, True), error.sum(1, True)]
        weights = [w - lr[:, None, None] * (g + decay[:, None, None] * w) for w, g in zip(weights, slopes, strict=True)]
    return _summarize(measured)


def _measure(
    weights: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, measured: dict[str, list[torch.Tensor]]
) -> None:
    for name, part in (("val_accuracy", slice(900, 1250)), ("test_accuracy", slice(1250, 1600))):
        inner = x[part] @ weights[0] + weights[2]
        outer = torch.baddbmm(weights[3], torch.sigmoid(inner), weights[1])
        measured[name].append((outer.argmax(2) == y[part]).float().mean(1))
        if name == "val_accuracy":
            ranks = torch.sort(inner[:, :100, :4], 1).values
            measured["percentiles"].append(ranks[:, (15, 50, 85)].mT)


def _summarize(measured: dict[str, list[torch.Tensor]]) -> pd.DataFrame:
    curve = torch.stack(measured["val_accuracy"], 1).double().numpy()
    test = torch.stack(measured["test_accuracy"], 1).double().numpy()
    best = curve.argmax(1)
    rows = np.arange(len(curve))
    paths = torch.stack(measured["percentiles"], 1).numpy()
    return pd.DataFrame(
        {
            "val_accuracy": curve[rows, best],
            "test_accuracy": test[rows, best],
            "drift": [drift_of_run(path) for path in paths],
            "curve": list(curve),
            "diverged": False,
        }
    )


def _study_of(trained: pd.DataFrame, rng: np.random.Generator, seeds: int) -> pd.DataFrame:
    """A study of two arms that are the trained network, under seeds dealt out at random."""
    dealt = rng.permutation(32)[: 2 * (seeds + 2)].reshape(2, -1)
    parts = []
    for arm, own in zip(ARMS, dealt, strict=True):
        part = trained[trained["seed"].isin(own)]
        purpose = np.where(part["seed"].isin(own[:2]), "choose", "measure")
        parts.append(part.assign(arm=arm, purpose=purpose))
    runs = pd.concat(parts, ignore_index=True)
    chosen = (runs["arm"] == ARMS[0]) & (runs["purpose"] == "choose")
    base = (runs["weight_decay"] == 0) & (runs["dropout"] == 0)
    attained = runs[chosen & base].groupby("lr")["val_accuracy"].median().max()
    target = attained - 1.96 * (attained * (1 - attained) / 350) ** 0.5
    arrived = [np.flatnonzero(curve >= target) for curve in runs["curve"]]
    runs["steps"] = STEPS[-1]
    runs["steps_to_target"] = [STEPS[hits[0]] if len(hits) else np.nan for hits in arrived]
    return runs


def test_real_runs_of_one_network_show_no_difference(trained: pd.DataFrame) -> None:
    assert trained["val_accuracy"].max() > 0.85 > 2 * CHANCE  # the network does learn
    rng, trials, wrong = np.random.default_rng(6), 60, Counter()
    for trial in range(trials):
        runs = _study_of(trained, rng, (2, 4, 8)[trial % 3])
        wrong.update(name for name, claim in claims_of(runs).items() if claim.verdict in ("better", "worse"))
    assert max(wrong.values(), default=0) <= _most(trials)
