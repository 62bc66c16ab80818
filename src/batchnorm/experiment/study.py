"""The experiment: what batch normalization does to one network on one data set, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..experiment.claims import Claim, compute_claims
from ..experiment.data import Dataset, load
from ..experiment.engine import Execute, Row, check_engine, open_engine
from ..experiment.factors import (
    Factors,
    choose_level_rates,
    most_runs,
    own_level,
    parse_batch_sizes,
    parse_optimizers,
    runs_to_choose,
    runs_to_measure,
)
from ..experiment.logs import RunLogs
from ..experiment.plan import BASE_SEED, Plan, Run, make_plan
from ..experiment.prepare import Prepared, prepare
from ..experiment.progress import ProgressView
from ..experiment.record import COLUMNS, Record
from ..experiment.report import write_report
from ..experiment.selection import choose_fastest, choose_rates, choose_settings
from ..experiment.summary import Outcome, command_line, summarize

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class StudyResult:
    """What `study` returns.

    Attributes:
        claims: the six claims by name.
        runs: runs.csv as a table, a row a training run, in the plan's order.
        summary: summary.json as a dictionary.
        report, runs_csv, summary_json: the three files.
    """

    claims: dict[str, Claim]
    runs: pd.DataFrame
    summary: dict[str, Any]
    report: Path
    runs_csv: Path
    summary_json: Path


def study(
    data: str = "digits",
    model: str = "mlp",
    arms: str | Iterable[str] = "none,batch",
    out: str | Path = "study",
    seeds: int | None = None,
    quick: bool = False,
    resume: bool = False,
    workers: int | None = None,
    engine: str = "local",
    *,
    address: str | None = None,
    log: str | Iterable[str] = "",
    lrs: str | Iterable[float] | None = None,
    steps: int | None = None,
    batch_size: str | int | Iterable[str | int] | None = None,
    optimizer: str | Iterable[str] | None = None,
    progress: TextIO | None = None,
) -> StudyResult:
    """Trains the same network under each arm over grids of settings and seeds, and measures how they differ.

    Args:
        data: ``digits``, ``openml:NAME``, a .npz, .npy, .csv or .parquet file, a folder of such shards or of images
            by class, or ``pkg.mod:function``, which returns a torch.utils.data.Dataset; the large are streamed.
        model: ``mlp``, ``cnn`` or ``pkg.mod:function``.
        arms: normalizations, comma-separated or iterable; the last is compared with the first.
        out: the folder for report.html, runs.csv, summary.json and the runs' traces.
        seeds: measuring seeds a setting, at least 2; None = 5 (2 when `quick`).
        quick: a smaller grid over the same range, fewer steps and seeds.
        resume: go on with the study in `out`, running exactly what is missing there.
        workers: processes side by side, one thread each; None = the cores available.
        engine: ``local``: processes of this machine; ``ray``: a Ray cluster's. The results are the same.
        address: the Ray cluster's HOST:PORT, ``auto`` for the one running here; None = one is started for the study.
        log: ``tensorboard``, ``mlflow`` or both, comma-separated or iterable: runs are shown there too.
        lrs: learning rates instead of the grid of half decades.
        steps: optimizer steps a run; None = 1000 (600 when `quick`).
        batch_size: samples an update, ``full`` for all training samples; None = 60. Several make batch size a factor.
        optimizer: of torch.optim: ``sgd``, ``momentum`` or ``nesterov`` (SGD with 0.9), ``adam``, ``adamw``; None =
            ``sgd``. Several make the optimizer a factor.
        progress: where to show progress; None = nowhere.

    Raises:
        UserError: anything wrong with the options, the data or the network, in one sentence.
    """
    started = time.monotonic()
    sizes = None if batch_size is None else parse_batch_sizes(batch_size)
    names = None if optimizer is None else parse_optimizers(optimizer)
    own_size, own_optimizer = own_level(sizes, names)
    plan = make_plan(
        model, arms, seeds=seeds, quick=quick, lrs=lrs, steps=steps, batch_size=own_size, optimizer=own_optimizer
    )
    check_engine(engine, workers, address)
    record = Record(Path(out))
    logs = RunLogs(log, record)
    own_lrs = lrs is not None
    prepared = prepare(plan, load(data, BASE_SEED, progress), model, sizes, names, quick=quick, own_lrs=own_lrs)
    runner = open_engine(engine, prepared.data, prepared.architecture, record.folder, workers, address)
    done = record.begin(prepared.options(), resume)
    rows, outcome = _run_and_judge(prepared, runner, record, done, logs, progress)
    command = command_line(
        prepared.plan, prepared.factors, data=data, model=model, out=str(out), quick=quick, own_lrs=own_lrs,
        own_size=sizes is not None,
    )  # fmt: skip
    summary = summarize(prepared, outcome, command, time.monotonic() - started)
    with record.writing():
        record.rewrite(rows)
        record.write_summary(summary)
        write_report(record.report, summary, outcome.runs, record.read_trace)
    return StudyResult(outcome.claims, outcome.runs, summary, record.report, record.runs_csv, record.summary_json)


def _run_and_judge(
    study: Prepared,
    engine: AbstractContextManager[Execute],
    record: Record,
    done: list[Row],
    logs: RunLogs,
    progress: TextIO | None,
) -> tuple[list[Row], Outcome]:
    """Returns the rows of all runs, in the plan's order, training those not `done`, and what they come to."""
    plan, data = study.plan, study.data
    own, added = _run_missing(plan, study.factors, data, engine, record, done, logs, progress)
    own, chosen, target = _evaluate_rows(plan, data, record, own)
    claims = compute_claims(
        _table(own), chosen, baseline=plan.arms[0], compared=plan.arms[-1], budget=plan.steps,
        target=target, chance=data.chance("validation"),
    )  # fmt: skip
    rows = own + with_steps(target, added, record)
    logs.complete(rows)
    return rows, Outcome(_table(rows), chosen, target, claims)


def _run_missing(
    plan: Plan,
    factors: Factors,
    data: Dataset,
    engine: AbstractContextManager[Execute],
    record: Record,
    done: list[Row],
    logs: RunLogs,
    progress: TextIO | None,
) -> tuple[list[Row], list[Row]]:
    """Returns the rows of all the plan's runs, in its order, and of the factors', training those not `done`."""
    rows = {row["run_id"]: row for row in done}
    logs.catch_up(done)
    total = len(plan) + most_runs(factors, plan)
    with engine as execute, ProgressView(total, len(rows), progress) as view:

        def finished(row: Row) -> None:
            rows[row["run_id"]] = row
            view.finished(row)
            logs.add(row)

        def wave(runs: list[Run]) -> list[Row]:
            execute([run for run in runs if run.run_id not in rows], finished)
            return [rows[run.run_id] for run in runs]

        own = wave(plan.runs_at_base())
        own += wave(plan.runs_at_best(choose_rates(_table(own), plan.arms)))
        choosing = wave(runs_to_choose(factors, plan))
        if not choosing:
            return own, []
        _, _, target = _evaluate_rows(plan, data, record, own)
        chosen = choose_level_rates(factors, plan, _table(with_steps(target, choosing, record)))
        measuring = runs_to_measure(factors, plan, chosen)
        view.expect(len(own) + len(choosing) + len(measuring))
        return own, choosing + wave(measuring)


def _evaluate_rows(
    plan: Plan, data: Dataset, record: Record, rows: list[Row]
) -> tuple[list[Row], dict[str, dict[str, float]], float | None]:
    """Returns the rows with `steps_to_target`, each arm's chosen setting and best rate, and the target."""
    table = _table(rows)
    best = choose_rates(table, plan.arms)
    chosen = {arm: {"best_lr": best[arm], **setting} for arm, setting in choose_settings(table, plan.arms).items()}
    target = _target(plan, rows, best[plan.arms[0]], data)
    evaluated = with_steps(target, rows, record)
    for arm, rate in choose_fastest(_table(evaluated), plan.arms).items():
        chosen[arm]["fastest_lr"] = rate
    return evaluated, chosen, target


def _target(plan: Plan, rows: list[Row], best_lr: float, data: Dataset) -> float | None:
    """Returns the validation accuracy that the first arm attains, None when it learns nothing at any rate.

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
    """Returns the rows with `steps_to_target`."""
    return [
        {**row, "steps_to_target": None if row["diverged"] else steps_to(target, record.read_trace(row["run_id"]))}
        for row in rows
    ]


def steps_to(target: float | None, trace: dict[str, Any]) -> float | None:
    """Returns the step at which a run's validation accuracy first reaches the target, None if it never does.

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


def _table(rows: list[Row]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = ["steps_to_target", "train_loss", "drift"]
    return table.astype({**dict.fromkeys(numbers, "float64"), "diverged": "bool"})
