"""What summary.json says of a study: where it comes from, how it was designed, and what came out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..design.factors import Factors
from ..design.plan import BASE_SEED, StudyPlan
from ..design.prepare import Prepared
from ..output.provenance import versions
from ..training.networks import DROPOUT, WHERE
from .claims import Claim
from .costs import update_seconds
from .factor_results import results


@dataclass(frozen=True)
class Outcome:
    """What the runs came to: all rows as a table, each arm's settings, the target, and the claims by name.

    `comparisons` has, by the name of the claim, all arms against the first where there are more than two.
    """

    runs: pd.DataFrame
    settings: dict[str, dict[str, float]]
    target: float | None
    claims: dict[str, Claim]
    comparisons: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def summarize(study: Prepared, outcome: Outcome, command: str, seconds: float) -> dict[str, Any]:
    """Return what summary.json holds; for each level of a factor the cost of an update is timed here.

    Args:
        command: a command line that makes this study again.
        seconds: how long the study took.
    """
    summary = {
        "schema": 1,
        **versions(),
        "command": command,
        "data": study.data.describe(),
        "model": study.model,
        **_design(study.plan, outcome),
        "layers": study.layers,
        "networks": study.trees,
        "runs": len(outcome.runs),
        "seconds": round(seconds, 1),
        "claims": {name: claim.to_json() for name, claim in outcome.claims.items()},
        "comparisons": outcome.comparisons,
    }
    if study.factors.levels:
        summary["factors"] = results(
            study.plan, study.factors, outcome.runs, outcome.settings, outcome.target, study.data.size("train"),
            lambda timed: update_seconds(timed, study.architecture, study.data),
        )  # fmt: skip
    return summary


def _design(plan: StudyPlan, outcome: Outcome) -> dict[str, Any]:
    return {
        "arms": list(plan.arms),
        "baseline": plan.arms[0],
        "compared": plan.arms[-1],
        "target_accuracy": outcome.target,
        "settings": outcome.settings,
        "grids": {
            "lr": list(plan.lrs),
            "weight_decay": list(plan.weight_decays),
            "dropout": list(plan.dropouts),
        },
        "seeds": {"choose": list(plan.choose_seeds), "measure": list(plan.measure_seeds)},
        "split_seed": BASE_SEED,
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "optimizer": plan.optimizer,
    }


def command_line(
    plan: StudyPlan,
    factors: Factors,
    *,
    data: str,
    model: str,
    out: str,
    quick: bool,
    own_lrs: bool,
    own_size: bool,
    where: str,
    dropout: str,
) -> str:
    """Return a command line that makes this study again, whichever way it was called."""
    words = ["batchnorm", "study", "--data", data, "--model", model, "--arms", ",".join(plan.arms), "--out", out]
    words += ["--quick"] if quick else []
    words += ["--where", where] if where != WHERE[0] else []
    words += ["--dropout", dropout] if dropout != DROPOUT[0] else []
    words += ["--lrs", ",".join(f"{lr:g}" for lr in plan.lrs)] if own_lrs else []
    words += ["--seeds", str(len(plan.measure_seeds)), "--steps", str(plan.steps)]
    sizes = [level.name.partition(" ")[0] for level in factors.batch_sizes] or [str(plan.batch_size)]
    # The default size may exceed small data and is reduced then. A size that the user gives is refused instead, so that
    # the command names a size only where the user did.
    words += ["--batch-size", ",".join(sizes)] if own_size else []
    names = [level.optimizer for level in factors.optimizers] or [plan.optimizer]
    words += ["--optimizer", ",".join(names)]
    return shlex.join(words)
