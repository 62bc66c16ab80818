"""Runs in a folder of MLflow's (``mlruns``): parameters and tags are the settings, metrics have their history."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import UserError
from .from_tensorboard import pick_tags
from .long_table import NEEDED


def read_mlflow(folder: Path, metric: str = "metric") -> pd.DataFrame:
    """Return a row for each value of the metric of all finished runs in all experiments.

    A run's arm, seed and settings are its parameters. The metric is the one whose name has ``val`` or ``eval``; one
    with ``test`` beside it gives the test rows.

    Raises:
        UserError: MLflow is not installed, a run without arm or seed, or no single metric.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as error:
        raise UserError(
            f"mlflow is not installed, {folder}, install it with pip install 'batchnorm[mlflow]'"
        ) from error
    client = MlflowClient(folder.resolve().as_uri())
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run for run in client.search_runs(experiments, max_results=50_000) if run.info.status == "FINISHED"]
    if not runs:
        raise UserError(f"no finished run, {folder}, give MLflow's folder of a finished study")
    runs.sort(key=lambda run: run.info.start_time)
    val, test = pick_tags([set(run.data.metrics) for run in runs], folder, metric)
    rows: list[dict[str, Any]] = []
    for run in runs:
        if missing := [name for name in NEEDED[:2] if name not in run.data.params]:
            name = run.info.run_name
            raise UserError(f"no {' and no '.join(missing)} of run {name}, {folder}, log them as parameters")
        for split, tag in (("val", val), ("test", test)):
            points = client.get_metric_history(run.info.run_id, tag) if tag else []
            latest = {point.step: {"metric": point.value, "step": point.step, "split": split} for point in points}
            rows += [{**run.data.params, **row} for row in latest.values()]
    return pd.DataFrame(rows)
