"""Each estimator against numbers worked out by hand, its words, and studies in which there is little to say."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.experiment.analysis.claims import Claim, compute_claims
from batchnorm.experiment.analysis.measures import decades_within, reaches_grid_end
from batchnorm.experiment.analysis.target import target_accuracy, unlearnt
from batchnorm.experiment.training.probe import drift_of_run

from .simulated_study import ARMS, Law, claims_of, draw_study

NAMES = ["convergence", "learning_rate", "weight_decay", "dropout", "generalization", "drift"]
SETTING = {"best_lr": 1.0, "lr": 1.0, "weight_decay": 0.0, "dropout": 0.0}
# Four measuring and two choosing seeds of one setting: sample standard deviations are not all equal.
STEPS = {"first": [400.0, 500.0, 450.0, 560.0], "last": [100.0, 120.0, 90.0, 110.0]}


def _runs(seeds: int = 4, choose: int = 2) -> pd.DataFrame:
    """A study whose numbers are the same in every run; a test then sets those it is about."""
    grid = [(lr, 0.0, 0.0) for lr in (0.1, 1.0, 10.0)] + [(1.0, 0.1, 0.0), (1.0, 0.0, 0.5)]
    names = [("choose", 1001 + i) for i in range(choose)] + [("measure", 1 + i) for i in range(seeds)]
    rows = [(arm, *name, *setting) for arm in ARMS for setting in grid for name in names]
    runs = pd.DataFrame(rows, columns=["arm", "purpose", "seed", "lr", "weight_decay", "dropout"])
    return runs.assign(val_accuracy=0.9, test_accuracy=0.9, steps_to_target=100.0, drift=0.5, diverged=False)


def _at(runs: pd.DataFrame, arm: str, purpose: str = "measure", lr: float = 1.0, decay: float = 0.0) -> pd.Series:
    keys = {"arm": arm, "purpose": purpose, "lr": lr, "weight_decay": decay, "dropout": 0.0}
    return (runs[list(keys)] == pd.Series(keys)).all(axis=1)


def _claims(runs: pd.DataFrame, **options: object) -> dict[str, Claim]:
    settings = dict.fromkeys(ARMS, SETTING)
    claims = compute_claims(runs, settings, baseline="first", compared="last", budget=1000, **options)
    assert list(claims) == NAMES
    for claim in claims.values():
        json.dumps(claim.to_json(), allow_nan=False)
        low = -math.inf if claim.ci_low is None else claim.ci_low
        high = math.inf if claim.ci_high is None else claim.ci_high
        if claim.verdict == "not measurable":
            assert (claim.estimate, claim.ci_low, claim.ci_high) == (None, None, None)
            assert claim.text == f"no claim: {claim.reason}"
        else:
            assert (low <= claim.null <= high) == (claim.verdict == "no difference")
            assert claim.reason is None
        assert claim.estimate is None or low <= claim.estimate <= high
        assert claim.text
        assert "nan" not in claim.text
    return claims


def _steps_study() -> pd.DataFrame:
    runs = _runs()
    for arm, steps in STEPS.items():
        runs.loc[_at(runs, arm), "steps_to_target"] = steps
    return runs


def test_convergence_is_the_ratio_of_geometric_means_with_welchs_interval() -> None:
    from scipy import stats

    claim = _claims(_steps_study(), target=0.964)["convergence"]
    logs = [np.log(STEPS[arm]) for arm in ARMS]
    reference = stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.95)
    assert claim.estimate == pytest.approx(np.exp(logs[0].mean() - logs[1].mean()), rel=1e-9)
    assert (claim.ci_low, claim.ci_high) == pytest.approx((math.exp(reference.low), math.exp(reference.high)), rel=1e-9)
    assert claim.verdict == "better"
    assert claim.text == "reaches 96.4 % in 4.5 times fewer steps, 95 % interval 3.6–5.7"


def test_the_same_numbers_the_other_way_round_are_worse() -> None:
    runs = _steps_study()
    runs["arm"] = runs["arm"].map(dict(zip(ARMS, reversed(ARMS), strict=True)))
    claim = _claims(runs, target=0.964)["convergence"]
    assert claim.verdict == "worse"
    assert claim.text == "needs 4.5 times more steps to reach 96.4 %, 95 % interval 3.6–5.7"


def test_a_censored_run_moves_the_estimate_up_and_opens_the_interval_upwards() -> None:
    whole, runs = _claims(_steps_study())["convergence"], _steps_study()
    runs.loc[runs.index[_at(runs, "first")][3], "steps_to_target"] = np.nan
    claim = _claims(runs)["convergence"]
    dropped = np.exp(np.log(STEPS["first"][:3]).mean() - np.log(STEPS["last"]).mean())
    assert claim.censored == 1
    assert claim.estimate > max(whole.estimate, dropped)
    assert claim.ci_high > whole.ci_high
    assert claim.text.endswith("; never there in 1000 steps: 1 of first")


def test_a_diverged_run_has_not_arrived_even_if_it_once_did() -> None:
    runs = _steps_study()
    runs.loc[runs.index[_at(runs, "last")][0], "diverged"] = True
    assert _claims(runs)["convergence"].censored == 1


def test_an_arm_that_never_arrives_gives_a_bound() -> None:
    runs = _steps_study()
    runs.loc[_at(runs, "first"), "steps_to_target"] = np.nan
    claim = _claims(runs, target=0.964)["convergence"]
    assert (claim.verdict, claim.ci_high, claim.censored) == ("better", None, 4)
    assert claim.estimate == pytest.approx(1000 / np.exp(np.log(STEPS["last"]).mean()))
    assert 5 < claim.ci_low < claim.estimate
    assert "in at least 9.6 times fewer steps, 95 % interval over" in claim.text
    runs = _steps_study()
    runs.loc[_at(runs, "last"), "steps_to_target"] = np.nan
    claim = _claims(runs)["convergence"]
    assert (claim.verdict, claim.ci_low) == ("worse", 0.0)
    assert claim.ci_high < 1


@pytest.mark.parametrize("seeds", [2, 3])
def test_too_few_seeds_give_no_bound(seeds: int) -> None:
    # Two runs that arrive against two that do not happen by luck once in three studies.
    runs = _runs(seeds)
    runs.loc[_at(runs, "first"), "steps_to_target"] = np.nan
    claim = _claims(runs)["convergence"]
    assert (claim.estimate, claim.ci_low, claim.ci_high, claim.verdict) == (None, None, None, "not measurable")
    assert claim.reason.startswith("too few of the")


def test_neither_arm_arrives() -> None:
    claim = _claims(_runs().assign(steps_to_target=np.nan))["convergence"]
    assert claim.estimate is None
    assert claim.censored == 8


@pytest.mark.parametrize(
    ("accuracies", "width", "cut"),
    [
        ([0.5, 0.9, 0.9, 0.5], 1 + 2 * 0.02 / 0.4, False),
        ([0.9, 0.9, 0.9, 0.9], 3.0, True),
        ([0.5, 0.9, 0.5, 0.9], 0.02 / 0.4 * 3, True),
        ([0.9, 0.88, 0.86, 0.84], 1.0, True),
        ([0.1, 0.11, 0.1, 0.1], 0.0, False),
    ],
)
def test_decades_within_two_points(accuracies: list[float], width: float, cut: bool) -> None:
    chance = 0.1 if max(accuracies) < 0.2 else 0.0
    assert decades_within([0.01, 0.1, 1, 10], accuracies, chance) == pytest.approx(width, abs=1e-6)
    if chance == 0:
        assert reaches_grid_end(accuracies) == cut


def test_learning_rate_counts_what_the_grid_cuts_off() -> None:
    runs = _runs()
    runs.loc[_at(runs, "first", lr=10.0) | _at(runs, "first", lr=0.1), "val_accuracy"] = 0.5
    claim = _claims(runs)["learning_rate"]
    assert claim.estimate == pytest.approx(2 - 2 * 0.02 / 0.4)
    assert (claim.censored, claim.verdict) == (4, "better")
    assert claim.text.startswith("works over 1.9 decades more of learning rate (2.0 against 0.10), 95 % interval")
    assert claim.text.endswith("; the grid's end cuts the range short for 4 of 8 seeds")


def test_spread_is_best_minus_worst_as_the_choosing_seeds_rank_them() -> None:
    runs = _runs()
    runs.loc[_at(runs, "first", decay=0.1), "val_accuracy"] = [0.80, 0.81, 0.79, 0.80]
    runs.loc[_at(runs, "first", "choose", decay=0.1), "val_accuracy"] = [0.80, 0.81]
    claims = _claims(runs)
    assert claims["weight_decay"].estimate == pytest.approx(-10)
    assert claims["weight_decay"].verdict == "better"
    assert claims["weight_decay"].text.startswith(
        "accuracy varies 10.0 points less over the weight-decay grid (0.00 against 10.0), 95 % interval "
    )
    assert claims["dropout"].estimate == 0


def test_noise_alone_has_no_spread() -> None:
    rng, spreads = np.random.default_rng(0), []
    for _ in range(25):
        runs = _runs()
        noisy = runs["arm"] == "last"
        runs.loc[noisy, "val_accuracy"] = rng.normal(0.9, 0.01, noisy.sum())
        spreads.append(_claims(runs)["dropout"].estimate)
    # The largest minus the smallest of two would average 1.13 points here.
    assert abs(np.mean(spreads)) < 4 * 1 * np.sqrt(2 / 4) / np.sqrt(25)


def test_generalization_is_in_points_and_at_the_chosen_setting() -> None:
    runs = _runs()
    runs.loc[_at(runs, "last"), "test_accuracy"] = [0.93, 0.94, 0.93, 0.94]
    claim = _claims(runs)["generalization"]
    assert claim.estimate == pytest.approx(3.5)
    assert claim.text.startswith("test accuracy 3.5 points higher (93.5 % against 90.0 %), 95 % interval")


def test_drift_is_a_ratio_of_geometric_means() -> None:
    runs = _runs()
    runs.loc[_at(runs, "last"), "drift"] = [0.1, 0.12, 0.09, 0.11]
    claim = _claims(runs)["drift"]
    assert claim.estimate == pytest.approx(np.exp(np.log([0.1, 0.12, 0.09, 0.11]).mean()) / 0.5)
    assert claim.verdict == "better"


def test_ties_are_not_certainty() -> None:
    runs = _runs(seeds=2)
    lattice = 1 / 360
    runs["test_accuracy"] = 0.9
    runs.loc[_at(runs, "last"), "test_accuracy"] = 0.9 + lattice
    claim = _claims(runs)["generalization"]
    assert claim.estimate == pytest.approx(100 * lattice)
    assert claim.ci_low < 0 < claim.ci_high


@pytest.mark.parametrize(
    "spoil",
    [
        lambda runs: runs.assign(drift=np.nan),
        lambda runs: runs.assign(drift=0.0),
        lambda runs: runs.assign(diverged=True, val_accuracy=0.1, test_accuracy=0.1, steps_to_target=np.nan),
        lambda runs: runs.assign(val_accuracy=np.nan, test_accuracy=np.nan),
        lambda runs: runs.assign(steps_to_target=0.0),
        lambda runs: runs[runs["lr"] == 1.0],
        lambda runs: runs[(runs["weight_decay"] == 0) & (runs["dropout"] == 0)],
        lambda runs: runs[runs["purpose"] == "choose"],
        lambda runs: runs[runs["purpose"] == "measure"],
        lambda runs: runs[runs["seed"].isin([1, 1001])],
        lambda runs: runs[runs["arm"] == "first"],
        lambda runs: runs.iloc[:0],
        lambda runs: runs.iloc[::3],
    ],
)
@pytest.mark.parametrize("seeds", [2, 4])
def test_little_to_say_is_said(spoil: object, seeds: int) -> None:
    verdicts = {claim.verdict for claim in _claims(spoil(_runs(seeds))).values()}
    assert verdicts <= {"no difference", "not measurable"}


def test_one_value_of_a_setting_alone_is_not_measurable() -> None:
    runs = _runs()
    claims = _claims(runs[(runs["lr"] == 1.0) & (runs["dropout"] == 0)])
    assert {name for name, claim in claims.items() if claim.verdict == "not measurable"} == {"learning_rate", "dropout"}
    assert claims["learning_rate"].reason == "first has one value of learning rate, it takes two of each"
    assert claims["dropout"].reason.startswith("first has one value of dropout")


def test_two_arms_that_learn_nothing_above_chance_are_not_compared() -> None:
    said = {"first": "first learns nothing", "last": "last learns nothing"}
    claims = _claims(_steps_study(), unlearnt=said)
    assert {claim.verdict for claim in claims.values()} == {"not measurable"}
    assert {claim.reason for claim in claims.values()} == {"first learns nothing; last learns nothing"}
    alone = _claims(_steps_study(), unlearnt={"first": "first learns nothing"})
    assert alone["convergence"].reason == "no target, first learns nothing"  # the first arm sets the target
    assert {claim.verdict for name, claim in alone.items() if name != "convergence"} == {"no difference"}


def test_seeds_of_an_arm_with_one_setting_chose_nothing_and_all_measure() -> None:
    runs = _runs()
    runs = runs[(runs["lr"] == 1.0) & (runs["dropout"] == 0) & (runs["weight_decay"] == 0)].copy()
    runs.loc[runs["arm"] == "last", "test_accuracy"] = [0.96, 0.97, 0.93, 0.94, 0.93, 0.94]
    claim = _claims(runs)["generalization"]
    assert claim.n == 6
    assert claim.estimate == pytest.approx(4.5)


def test_target_must_exceed_chance_by_its_own_interval() -> None:
    plan = SimpleNamespace(arms=("first", "last"))
    data = SimpleNamespace(chance=lambda part: 0.5, y={"validation": range(100)})
    base = {"purpose": "choose", "lr": 1.0, "weight_decay": 0.0, "dropout": 0.0}
    rows = [{**base, "arm": arm, "val_accuracy": a} for arm, a in (("first", 0.59), ("last", 0.61))]
    assert target_accuracy(plan, rows, 1.0, data) is None  # 0.59 − 1.96·0.049 < 0.5
    assert list(unlearnt(plan, rows, dict.fromkeys(plan.arms, 1.0), data)) == ["first"]
    rows[0]["val_accuracy"] = 0.61
    assert target_accuracy(plan, rows, 1.0, data) == pytest.approx(0.61 - 1.96 * math.sqrt(0.61 * 0.39 / 100))


def test_a_network_that_never_learns_tolerates_no_rate() -> None:
    runs = _runs()
    runs.loc[runs["arm"] == "last", "val_accuracy"] = 0.1
    assert _claims(runs, chance=0.1)["learning_rate"].estimate == pytest.approx(-2)


@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.integers(0, 2**32 - 1))
def test_drift_of_run_does_not_see_shift_and_scale(scale: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = np.sort(rng.normal(size=(7, 5, 3)), axis=2)
    assert drift_of_run(scale * path + shift) == pytest.approx(drift_of_run(path), rel=1e-6)


def test_drift_of_run_by_hand() -> None:
    # One unit of spread 2 whose three percentiles move together by 0, 3: standard deviation 1.5, in spreads 0.75.
    path = np.array([[[-1.0, 0, 1]], [[2.0, 3, 4]]])
    assert drift_of_run(path) == pytest.approx(0.75)
    still = np.repeat(path[:1], 4, axis=0)
    assert drift_of_run(still) == 0
    assert drift_of_run(np.concatenate([path, np.full((1, 1, 3), np.nan)])) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "path", [np.zeros((4, 3, 3)), np.zeros((1, 3, 3)), np.full((4, 3, 3), np.inf), np.zeros((4, 0, 3))]
)
def test_drift_of_run_without_movement_to_measure_is_nan(path: np.ndarray) -> None:
    assert math.isnan(drift_of_run(path))


def test_drift_of_run_survives_huge_values_and_refuses_other_shapes() -> None:
    assert math.isfinite(drift_of_run(np.sort(np.random.default_rng(0).normal(size=(4, 2, 3)), axis=2) * 1e300))
    with pytest.raises(ValueError, match="shape"):
        drift_of_run(np.zeros((4, 3)))


def test_a_drawn_study_with_effects_shows_them() -> None:
    law = Law(speed=2.0, width=3, cliff=1.8, top=0.985, drift=0.1, decay_at=1.0, dropout_cost=0.0)
    runs = draw_study(np.random.default_rng(3), (replace(Law(), top=0.96), law), seeds=6)
    claims = claims_of(runs)
    assert {name for name, claim in claims.items() if claim.verdict == "better"} >= {
        "convergence",
        "learning_rate",
        "drift",
    }
    assert all(claim.verdict != "worse" for claim in claims.values())
