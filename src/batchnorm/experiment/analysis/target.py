"""The target accuracy, and after how many steps each run reaches it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ..data.dataset import Dataset
from ..design.plan import StudyPlan
from ..design.selection import choose_fastest, choose_rates, choose_settings
from ..output.study_folder import COLUMNS, Record, Row
from .wording import percent


def evaluate_rows(
    plan: StudyPlan, data: Dataset, record: Record, rows: list[Row]
) -> tuple[list[Row], dict[str, dict[str, float]], float | None]:
    """Return the rows with `steps_to_target`, each arm's chosen setting and best rate, and the target."""
    table = runs_table(rows)
    best = choose_rates(table, plan.arms)
    chosen = {arm: {"best_lr": best[arm], **setting} for arm, setting in choose_settings(table, plan.arms).items()}
    target = target_accuracy(plan, rows, best[plan.arms[0]], data)
    evaluated = with_steps(target, rows, record)
    for arm, rate in choose_fastest(runs_table(evaluated), plan.arms).items():
        chosen[arm]["fastest_lr"] = rate
    return evaluated, chosen, target


def target_accuracy(plan: StudyPlan, rows: list[Row], best_lr: float, data: Dataset) -> float | None:
    """Return the validation accuracy that the first arm attains, None when it learns nothing at any rate.

    The lower 95 % limit, for so many samples, of the median over the choosing seeds at the arm's best rate (the
    measuring seeds have no part in it). On the plateau above, which run is first is a lottery. A limit that is not
    above chance is no target: an untrained network may reach it.
    """
    limit = lower_limit(_attained(rows, plan.arms[0], best_lr), len(data.y["validation"]))
    return limit if limit > data.chance("validation") else None


def unlearnt(plan: StudyPlan, rows: list[Row], rates: Mapping[str, float], data: Dataset) -> dict[str, str]:
    """Return the arms that learn nothing above chance at their best rate, by the interval of `target_accuracy`.

    Returns:
        For each such arm a clause that says so.
    """
    chance, samples = data.chance("validation"), len(data.y["validation"])
    attained = {arm: _attained(rows, arm, rates[arm]) for arm in plan.arms}
    return {
        arm: f"{arm} learns nothing above chance: {percent(value)} on {samples} samples, chance is {percent(chance)}"
        for arm, value in attained.items()
        if lower_limit(value, samples) <= chance
    }


def _attained(rows: list[Row], arm: str, lr: float) -> float:
    """Return the median validation accuracy of an arm's choosing seeds at a rate, without regularizers."""
    return statistics.median(
        row["val_accuracy"]
        for row in rows
        if (row["arm"], row["purpose"], row["lr"]) == (arm, "choose", lr) and row["weight_decay"] == row["dropout"] == 0
    )


def lower_limit(accuracy: float, samples: int) -> float:
    """Return the lower 95 % limit of an accuracy on so many samples, by the normal law."""
    return accuracy - 1.96 * (accuracy * (1 - accuracy) / samples) ** 0.5


def with_steps(target: float | None, rows: list[Row], record: Record) -> list[Row]:
    """Return the rows with `steps_to_target`."""
    return [
        {**row, "steps_to_target": None if row["diverged"] else steps_to(target, record.read_trace(row["run_id"]))}
        for row in rows
    ]


def steps_to(target: float | None, trace: dict[str, Any]) -> float | None:
    """Return the step at which a run's validation accuracy first reaches the target, None if it never does.

    Drawn straight between evaluations, so that the grid of evaluation steps does not round the answer.
    """
    if target is None:
        return None
    steps, accuracies = trace["steps"], trace["val_accuracy"]
    for k, accuracy in enumerate(accuracies):
        if accuracy >= target:
            if k == 0:
                return float(steps[0])
            share = (target - accuracies[k - 1]) / (accuracy - accuracies[k - 1])
            return round(steps[k - 1] + share * (steps[k] - steps[k - 1]), 3)
    return None


def runs_table(rows: list[Row]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = ["steps_to_target", "train_loss", "drift"]
    return table.astype({**dict.fromkeys(numbers, "float64"), "diverged": "bool"})
