"""Runs in MLflow: in OUT/mlruns, or where MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from ..output.study_folder import Record, Row
from .run_log import PARAMETERS, curves_of, finals_of

os.environ.setdefault(
    "MLFLOW_DISABLE_TELEMETRY", "true"
)  # mlflow reads it when it is imported; a study sends no telemetry

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, ViewType
from mlflow.exceptions import MlflowException

_STUDY, _ROW = "batchnorm.study", "batchnorm.row"
_PAGE = 1000


class MlflowLog:
    """One experiment a study folder, named after it (or by MLFLOW_EXPERIMENT_NAME), and in it one MLflow run a run.

    Two tags tell a resumed study what is there already: which study a run belongs to (a store may hold many), and a
    digest of its row. A run that was trained again, because its row had been lost, takes the place of the first.
    """

    errors: tuple[type[Exception], ...] = (OSError, MlflowException)

    def __init__(self, record: Record) -> None:
        self._record = record
        self._store = os.environ.get("MLFLOW_TRACKING_URI")
        self.where = self._store or str(record.folder / "mlruns")
        self._name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or f"batchnorm study {record.folder.resolve().name}"
        self._held: dict[str, Run] = {}  # the complete runs of this study, by our run_id

    def open(self) -> None:
        # MLflow no longer develops its file store and asks for this. The database that it prefers is slow to create.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        if self._store is None:
            Path(self.where).mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(self._store or Path(self.where).resolve().as_uri())
        found = self._client.get_experiment_by_name(self._name)
        self._experiment = found.experiment_id if found else self._client.create_experiment(self._name)
        self._study = _digest([self._record.plan_json.read_text(), self._store and str(self._record.folder.resolve())])
        for run in self._runs_of_study():
            if run.info.status == "FINISHED":
                self._held[run.info.run_name] = run
            else:  # cut short when its study was killed: written again
                self._client.delete_run(run.info.run_id)

    def _runs_of_study(self) -> list[Run]:
        runs: list[Run] = []
        wanted, token = f"tags.`{_STUDY}` = '{self._study}'", None
        while True:
            page = self._client.search_runs([self._experiment], wanted, ViewType.ACTIVE_ONLY, _PAGE, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def holds(self, row: Row) -> bool:
        held = self._held.get(row["run_id"])
        return held is not None and held.data.tags.get(_ROW) == _digest_row(row)

    def add(self, row: Row, trace: dict[str, Any]) -> None:
        now = int(time.time() * 1000)
        tags = {_STUDY: self._study, _ROW: _digest_row(row)}
        run = self._client.create_run(self._experiment, now - round(1000 * row["seconds"]), tags, row["run_id"])
        metrics = [Metric(name, value, now, step) for name, step, value in curves_of(trace)]
        metrics += [Metric(name, value, now, row["steps"]) for name, value in finals_of(row).items()]
        self._client.log_batch(run.info.run_id, metrics, [Param(name, str(row[name])) for name in PARAMETERS])
        self._client.set_terminated(run.info.run_id, end_time=now)
        if (earlier := self._held.get(row["run_id"])) is not None:
            self._client.delete_run(earlier.info.run_id)
        self._held[row["run_id"]] = run

    def complete(self, run_id: str, steps_to_target: float) -> None:
        run = self._held[run_id]
        if "steps_to_target" not in run.data.metrics:
            self._client.log_metric(run.info.run_id, "steps_to_target", steps_to_target)


def _digest_row(row: Row) -> str:
    """Return a digest that identifies the row of one training; `steps_to_target` is known later and left out."""
    return _digest({name: value for name, value in row.items() if name != "steps_to_target"})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
