"""The one opener of anyone's runs: a CSV file, a folder, a DataFrame or rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import UserError, quote_error
from .from_mlflow import read_mlflow
from .from_tensorboard import read_tensorboard
from .long_table import NEEDED, LongTable, check_columns, check_table


def read_long_table(source: Any, metric: str = "metric") -> LongTable:
    """Return the runs of a CSV file, a folder of them, of TensorBoard or MLflow, a DataFrame, or rows as mappings.

    `metric` is the one to take from a log that has several.

    Raises:
        UserError: the source cannot be read, lacks a column, or holds what is no run; it names the place.
    """
    if isinstance(source, (str, Path)):
        name = str(source)
        table = _read_path(Path(source), metric)
    elif isinstance(source, pd.DataFrame):
        name, table = "a DataFrame", source.copy()
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        rows = list(source)
        if not all(isinstance(row, Mapping) for row in rows):
            kind = type(rows[0]).__name__
            raise UserError(f"rows of {kind}, analyze(table=…), give mappings with {', '.join(NEEDED)}")
        name, table = "rows", pd.DataFrame(rows)
    else:
        raise UserError(
            f"a {type(source).__name__} is no table, analyze(table=…), give a CSV file, a folder, a DataFrame or rows"
        )
    return check_table(table.reset_index(drop=True), name)


def _read_path(path: Path, metric: str) -> pd.DataFrame:
    if not path.exists():
        raise UserError(f"no such file or folder, analyze(table={path}), give a CSV file or a folder of runs")
    if path.is_file():
        return _read_csv(path)
    if any(path.rglob("events.out.tfevents.*")):
        return read_tensorboard(path, metric)
    if any(path.glob("*/meta.yaml")):
        return read_mlflow(path, metric)
    files = sorted(file for file in path.glob("*.csv") if not file.name.startswith("."))
    if not files:
        raise UserError(
            f"no runs in this folder, analyze(table={path}), give one with .csv files, TensorBoard's event files or "
            "MLflow's experiments"
        )
    return pd.concat([_read_csv(file) for file in files], ignore_index=True)


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        # As text: pandas would take an arm named None for a hole.
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"not a table of runs ({quote_error(error, 90)}), {path}, write one row a value") from error
    check_columns(table, str(path))
    return table
