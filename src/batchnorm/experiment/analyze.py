"""Anyone's runs, judged: a table of logged values becomes claims with intervals, verdicts and the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ..errors import UserError, quote_error
from .analysis.claims import Claim, compute_claims, unclaimed
from .analysis.comparisons import ClaimsOf, compare_all
from .analysis.intervals import LEVEL
from .analysis.metric import Metric
from .design.selection import choose_fastest, choose_rates, choose_settings, rows_at
from .output.files import write_whole
from .output.provenance import versions
from .recorded.long_table import LongTable
from .recorded.run_table import NoTarget, RunTable, make_runs, target_score, with_arrivals
from .recorded.table_sources import read_long_table
from .report.page import write_report
from .study_result import StudyResult

KIND = "analysis"
Settings = dict[str, dict[str, Any]]


def analyze(
    table: str | Path | pd.DataFrame | Iterable[Mapping[str, Any]],
    out: str | Path = "analysis",
    *,
    target: float | None = None,
    chance: float | None = None,
    metric: str = "metric",
    direction: Literal["max", "min"] = "max",
) -> StudyResult:
    """Judge runs that anything has trained: the study's claims, intervals, verdicts and report from a table.

    A row is one logged value. The columns are ``arm, seed, step, metric``, optionally ``split`` (``val`` or ``test``;
    without it all rows are validation), ``purpose`` (``choose`` or ``measure``), and any settings, such as ``lr``,
    ``weight_decay``, ``dropout``. The first arm in the table is the baseline. Of four seeds and more the two smallest
    choose settings and the target, of three the smallest one; the others measure. A claim that the table cannot tell is
    not measurable, with its reason. Formulas: docs/study-analyze.md.

    Args:
        table: a CSV file, a folder of them, of TensorBoard's event files or of MLflow, a DataFrame, or rows as
            mappings.
        out: the folder for report.html, runs.csv and summary.json.
        target: the metric's value whose arrival is compared; None = what the baseline attains.
        chance: the metric's value without learning; a diverged run counts as this.
        metric: the metric's name in texts, and in a log that has several.
        direction: whether more (``max``) or less (``min``) is better.

    Returns:
        The claims, the runs and the summary.

    Raises:
        UserError: anything wrong with the table or the folder, in one sentence. Nothing is written then.
    """
    if direction not in ("max", "min"):
        raise UserError(f"unknown direction {direction!r}, analyze(direction=…), give max or min")
    read = read_long_table(table, metric)
    folder = Path(out)
    _refuse_foreign(folder)
    runs = make_runs(read, Metric(metric, direction == "max"), chance)
    given = None if target is None else float(runs.metric.score(target))
    runs, settings, goal, no_target = _chosen(read, runs, given)
    compared = _comparer(read, runs, settings, goal, no_target)
    claims = compared(read.arms[-1], LEVEL)
    comparisons = compare_all(read.arms, compared) if len(read.arms) > 2 else {}
    summary = _summary(read, runs, settings, goal, claims, comparisons)
    files = [folder / name for name in ("report.html", "runs.csv", "summary.json")]
    shown = runs.values()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The summary comes first: it marks the folder as an analysis, which a later one may replace.
        write_whole(files[2], json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        write_whole(files[1], shown.to_csv(index=False, lineterminator="\n"))
        write_report(files[0], summary, shown, runs.trace)
    except OSError as error:
        raise UserError(
            f"cannot be written ({quote_error(error)}), analyze(out={folder}), give a folder that can"
        ) from error
    return StudyResult(claims, shown, summary, *files)


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder whose files no analysis has written: nobody's runs are overwritten.

    Raises:
        UserError: it holds a study, or a file of one of the three names.
    """
    there = [name for name in ("report.html", "runs.csv", "summary.json", "plan.json") if (folder / name).exists()]
    try:
        held = json.loads((folder / "summary.json").read_text(encoding="utf-8")) if there else {"kind": KIND}
        ours = isinstance(held, dict) and held.get("kind") == KIND
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{there[0]} is there and of no analysis, analyze(out={folder}), give another folder")


def _chosen(
    read: LongTable, runs: RunTable, target: float | None
) -> tuple[RunTable, Settings, float | None, str | None]:
    """Return the runs with their arrivals, each arm's settings, the target's score, and why there is none."""
    rows, base = runs.scores, runs.base
    # Without choosing seeds an arm's only setting needs no choice; several cannot be chosen among.
    choosing = rows if (rows["purpose"] == "choose").any() else rows.assign(purpose="choose")
    at_base = [arm for arm in read.arms if len(rows_at(choosing, arm=arm, purpose="choose", **base))]
    rated = choose_rates(choosing, at_base, base) if at_base else {}
    picked = choose_settings(choosing, read.arms, base)
    settings: Settings = {arm: {"best_lr": rated.get(arm), **picked[arm]} for arm in read.arms}
    why = None
    if target is None:
        try:
            target = target_score(runs, read.arms[0], settings)
        except NoTarget as error:
            why = str(error)
    runs = with_arrivals(runs, target)
    choosing = choosing.assign(steps_to_target=runs.scores["steps_to_target"])
    for arm, rate in (choose_fastest(choosing, at_base, base) if at_base else {}).items():
        settings[arm]["fastest_lr"] = rate
    return runs, settings, target, why


def _comparer(
    read: LongTable, runs: RunTable, settings: Settings, target: float | None, no_target: str | None
) -> ClaimsOf:
    """Return the function from an arm and a level to the arm's claims against the baseline."""
    rows, unchosen = runs.scores, ""
    several = rows.groupby("arm")[["lr", *runs.base]].apply(lambda group: len(group.drop_duplicates()) > 1)
    if several.any() and not (rows["purpose"] == "choose").any():
        unchosen = "fewer than three seeds an arm, and one at least must choose the setting that the others measure"

    def claims_of(arm: str, level: float) -> dict[str, Claim]:
        found = compute_claims(
            rows, settings, baseline=read.arms[0], compared=arm, budget=runs.budget, target=target,
            chance=runs.untrained, metric=runs.metric, base=runs.base, tested=runs.tested, no_target=no_target,
            level=level,
        )  # fmt: skip
        drift = found["drift"]
        found["drift"] = unclaimed(drift.null, drift.unit, "the table has no percentiles of hidden units")
        if unchosen:
            free = ("learning_rate", "drift")
            found |= {name: unclaimed(c.null, c.unit, unchosen) for name, c in found.items() if name not in free}
        return found

    return claims_of


def _summary(
    read: LongTable,
    runs: RunTable,
    settings: Settings,
    target: float | None,
    claims: Mapping[str, Claim],
    comparisons: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Return what summary.json holds."""
    scores, told = runs.scores, {"lr", "best_lr", "fastest_lr"} if "lr" in read.settings else set[str]()
    told |= set(read.settings)
    seeds = {
        purpose: sorted(int(seed) for seed in set(scores["seed"][scores["purpose"] == purpose]))
        for purpose in ("choose", "measure")
    }
    return {
        "schema": 1, "kind": KIND, **versions(), "data": {"name": read.name}, "model": "recorded runs",
        "metric": runs.metric.to_json(), "arms": list(read.arms), "baseline": read.arms[0], "compared": read.arms[-1],
        "target_accuracy": None if target is None else float(runs.metric.value(target)),
        "settings": {arm: {k: v for k, v in own.items() if k in told} for arm, own in settings.items()},
        "base": {name: level for name, level in runs.base.items() if name in read.settings},
        "grids": {name: sorted(set(scores[name])) for name in read.settings},
        "seeds": seeds, "steps": runs.budget, "runs": len(scores),
        "claims": {name: claim.to_json() for name, claim in claims.items()}, "comparisons": dict(comparisons),
    }  # fmt: skip
