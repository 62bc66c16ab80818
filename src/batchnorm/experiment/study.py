"""The experiment: what batch normalization does to one network on one data set, measured."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, TextIO

from ..errors import UserError
from .analysis.claims import Claim, compute_claims
from .analysis.comparisons import compare_all
from .analysis.intervals import LEVEL
from .analysis.summary import Outcome, command_line, summarize
from .analysis.target import evaluate_rows, runs_table, unlearnt, with_steps
from .data.opening import load
from .design.factors import (
    choose_level_rates,
    most_runs,
    own_level,
    runs_to_choose,
    runs_to_measure,
)
from .design.parsing import parse_batch_sizes, parse_optimizers
from .design.plan import BASE_SEED, make_plan
from .design.prepare import Prepared, prepare, tree_lines
from .design.selection import choose_rates
from .engines.base import Execute
from .engines.choice import check_engine, open_engine
from .logs.all_logs import RunLogs
from .output.progress import ProgressView
from .output.study_folder import Record, Row
from .report.page import write_report
from .study_result import StudyResult
from .training.networks import DROPOUT, WHERE
from .training.runs import Run


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
    where: Literal["same", "every"] = "same",
    dropout: Literal["keep", "replace"] = "keep",
    progress: TextIO | None = None,
) -> StudyResult:
    """Train the same network under each arm over grids of settings and seeds, and measures how they differ.

    Args:
        data: ``digits``, ``openml:NAME``, a .npz, .npy, .csv or .parquet file, a folder of such shards or of images
            by class, or ``pkg.mod:function``, which returns a torch.utils.data.Dataset; the large are streamed.
        model: ``pkg.mod:function`` or ``path/file.py:function``, written as ``build(arm, seed)``, which makes the arm
            itself, or as ``build()``, from whose network the arms are made; or ``mlp`` or ``cnn``.
        arms: comma-separated or iterable; the last is compared with the first. ``as_written`` is the network unchanged,
            ``without`` has its normalizations taken out; all others are normalizations.
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
        where: ``same``: arms have their layers in the places of the network's own normalizations, with their eps,
            momentum and affine; in a network without any, and with ``every`` in any network, after every hidden layer.
        dropout: ``keep``: a network with Dropout of its own keeps it in all runs and dropout is not varied;
            ``replace``: the grid of dropout takes its place.
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
    for name, given, known in (("where", where, WHERE), ("dropout", dropout, DROPOUT)):
        if given not in known:
            raise UserError(f"unknown rule {given!r}, study({name}=…), give {' or '.join(known)}")
    check_engine(engine, workers, address)
    record = Record(Path(out))
    logs = RunLogs(log, record)
    own_lrs = lrs is not None
    prepared = prepare(
        plan, load(data, BASE_SEED, progress), model, sizes, names, quick=quick, own_lrs=own_lrs, where=where,
        dropout=dropout,
    )  # fmt: skip
    runner = open_engine(engine, prepared.data, prepared.architecture, record.folder, workers, address)
    done = record.begin(prepared.options(), resume)
    for line in tree_lines(prepared.trees) if progress is not None else ():
        print(line, file=progress)
    own, added = _run_missing(prepared, runner, record, done, logs, progress)
    rows, outcome = _judge(prepared, record, own, added)
    logs.complete(rows)
    command = command_line(
        prepared.plan, prepared.factors, data=data, model=model, out=str(out), quick=quick, own_lrs=own_lrs,
        own_size=sizes is not None, where=where, dropout=dropout,
    )  # fmt: skip
    summary = summarize(prepared, outcome, command, time.monotonic() - started)
    with record.writing():
        record.rewrite(rows)
        record.write_summary(summary)
        write_report(record.report, summary, outcome.runs, record.read_trace)
    return StudyResult(outcome.claims, outcome.runs, summary, record.report, record.runs_csv, record.summary_json)


def _judge(study: Prepared, record: Record, own: list[Row], added: list[Row]) -> tuple[list[Row], Outcome]:
    """Return the rows of all runs with their steps to the target, and what they come to."""
    plan, data = study.plan, study.data
    own, chosen, target = evaluate_rows(plan, data, record, own)
    table, rates = runs_table(own), {arm: setting["best_lr"] for arm, setting in chosen.items()}
    missing = unlearnt(plan, own, rates, data)

    def claims_of(arm: str, level: float = LEVEL) -> dict[str, Claim]:
        return compute_claims(
            table, chosen, baseline=plan.arms[0], compared=arm, budget=plan.steps, target=target,
            chance=data.chance("validation"), unlearnt=missing, held=study.held(), level=level,
        )  # fmt: skip

    comparisons = compare_all(plan.arms, claims_of) if len(plan.arms) > 2 else {}
    rows = own + with_steps(target, added, record)
    return rows, Outcome(runs_table(rows), chosen, target, claims_of(plan.arms[-1]), comparisons)


def _run_missing(
    study: Prepared,
    engine: AbstractContextManager[Execute],
    record: Record,
    done: list[Row],
    logs: RunLogs,
    progress: TextIO | None,
) -> tuple[list[Row], list[Row]]:
    """Return the rows of all the plan's runs, in its order, and of the factors', training those not `done`."""
    plan, factors = study.plan, study.factors
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
        own += wave(plan.runs_at_best(choose_rates(runs_table(own), plan.arms)))
        choosing = wave(runs_to_choose(factors, plan))
        if not choosing:
            return own, []
        _, _, target = evaluate_rows(plan, study.data, record, own)
        chosen = choose_level_rates(factors, plan, runs_table(with_steps(target, choosing, record)))
        measuring = runs_to_measure(factors, plan, chosen)
        view.expect(len(own) + len(choosing) + len(measuring))
        return own, choosing + wave(measuring)
