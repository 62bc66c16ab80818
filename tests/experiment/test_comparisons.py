"""All arms against the baseline: Holm's rule by intervals, sorted."""

import math

import numpy as np
import pytest
from scipy import stats

from batchnorm.experiment.analysis.claims import ESTIMATORS, claim_difference, unclaimed
from batchnorm.experiment.analysis.comparisons import compare_all
from batchnorm.experiment.analysis.intervals import Sample

ARMS = ("none", "a", "b", "c", "d")


def _compared(values: dict[str, list[float]]) -> list[dict]:
    samples = {arm: Sample(np.array(numbers)) for arm, numbers in values.items()}

    def claims_of(arm: str, level: float) -> dict:
        if arm not in samples:
            return {"generalization": unclaimed(0, "points", "no runs")}
        pair = (samples["none"], samples[arm])
        return {"generalization": claim_difference(pair, "points", "", lambda interval: "", level=level)}

    return compare_all(ARMS, claims_of)["generalization"]


def _holm(p_values: dict[str, float]) -> set[str]:
    """Holm's rule as he wrote it, from p-values."""
    told, ranked = set(), sorted(p_values, key=p_values.get)
    for k, arm in enumerate(ranked):
        if p_values[arm] > 0.05 / (len(ranked) - k):
            break
        told.add(arm)
    return told


def test_verdicts_are_those_of_holms_rule_on_welchs_p_values() -> None:
    rng, differs = np.random.default_rng(0), 0
    for _ in range(60):
        shifts = dict(zip(ARMS, [0.0, *rng.choice([0, 1.2, 2.0, -2.0], 4)], strict=True))
        values = {arm: rng.normal(shift, 1, 8).tolist() for arm, shift in shifts.items()}
        p_values = {
            arm: float(stats.ttest_ind(values["none"], values[arm], equal_var=False).pvalue) for arm in ARMS[1:]
        }
        told = {entry["arm"] for entry in _compared(values) if entry["verdict"] in ("better", "worse")}
        assert told == _holm(p_values)
        differs += told != {arm for arm, p in p_values.items() if p <= 0.05}
    assert differs > 0  # without the correction some verdicts would be others


def test_every_verdict_follows_from_the_interval_beside_it() -> None:
    rng = np.random.default_rng(1)
    entries = _compared({arm: rng.normal(k, 1.5, 6).tolist() for k, arm in enumerate(ARMS)})
    for entry in entries:
        assert (entry["ci_low"] <= 0 <= entry["ci_high"]) == (entry["verdict"] == "no difference")
        assert entry["level"] in [pytest.approx(1 - 0.05 / m) for m in (1, 2, 3, 4)]


def test_arms_come_sorted_and_those_without_a_claim_do_not_count() -> None:
    entries = _compared({"none": [0.0, 0.1, 0.2], "a": [5.0, 5.1, 5.2], "b": [-5.0, -5.1, -5.2], "d": [9.0, 9.1, 9.2]})
    assert [entry["arm"] for entry in entries] == ["d", "a", "b", "c"]
    assert [entry["verdict"] for entry in entries] == ["better", "better", "worse", "not measurable"]
    assert entries[0]["level"] == pytest.approx(1 - 0.05 / 3)
    assert entries[-1]["reason"] == "no runs"


def test_every_claim_says_which_way_is_better() -> None:
    assert {name for name, e in ESTIMATORS.items() if e.larger_is_better} == {
        "convergence",
        "learning_rate",
        "generalization",
    }
    assert all(math.isfinite(estimator.null) for estimator in ESTIMATORS.values())
