"""The target accuracy, and after how many steps each run reaches it."""

from __future__ import annotations

import statistics
from typing import Any

import pandas as pd

from ..data.dataset import Dataset
from ..design.plan import StudyPlan
from ..design.selection import choose_fastest, choose_rates, choose_settings
from ..output.study_folder import COLUMNS, Record, Row


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
    measuring seeds have no part in it). On the plateau above, which run is first is a lottery.
    """
    attained = statistics.median(
        row["val_accuracy"]
        for row in rows
        if (row["arm"], row["purpose"], row["lr"]) == (plan.arms[0], "choose", best_lr)
        and row["weight_decay"] == row["dropout"] == 0
    )
    if attained <= data.chance("validation"):
        return None
    return attained - 1.96 * (attained * (1 - attained) / len(data.y["validation"])) ** 0.5


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
