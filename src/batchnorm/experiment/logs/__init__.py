"""Shows a study's runs where people already look, beside our own files, which stay the record.

The driver writes them, a run at a time and after the run's row is on disk. A log that already holds a run's row is left
as it is, so that a resumed study adds what is missing and doubles nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ...errors import UserError, quote_error
from ...experiment.record import COLUMNS, Record

Row = dict[str, Any]
LOGS = ("tensorboard", "mlflow")
CURVES = ("val_accuracy", "train_loss")
_FINALS = ("val_accuracy", "test_accuracy", "final_val_accuracy", "train_loss", "drift", "diverged", "seconds")
PARAMETERS = COLUMNS[1 : COLUMNS.index("steps_to_target")]


class RunLog(Protocol):
    """One place to show runs. `errors` are what it raises when it cannot be written, `where` is its address."""

    where: str
    errors: tuple[type[Exception], ...]

    def open(self) -> None:
        """Makes sure that it can be written."""

    def holds(self, row: Row) -> bool:
        """Returns whether the run is there as a whole."""

    def add(self, row: Row, trace: dict[str, Any]) -> None:
        """Writes the run's parameters, curves and final metrics."""

    def complete(self, run_id: str, steps_to_target: float) -> None:
        """Adds, once, what is known only after all runs."""


def curves_of(trace: dict[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Yields (curve/NAME, step, value) for every evaluation that has one."""
    for name in CURVES:
        for step, value in zip(trace["steps"], trace[name], strict=True):
            if value is not None:
                yield f"curve/{name}", step, float(value)


def finals_of(row: Row) -> dict[str, float]:
    """Returns the row's results under the names of runs.csv's columns, without those it does not have."""
    return {name: float(row[name]) for name in _FINALS if row[name] is not None}


class RunLogs:
    """All the logs that `--log` names, and what is common to them: names, order, errors."""

    def __init__(self, names: str | Iterable[str], record: Record) -> None:
        wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
        self._record = record
        self._logs = [_make(name, record) for name in dict.fromkeys(wanted) if name]

    def catch_up(self, rows: list[Row]) -> None:
        """Opens the logs and writes those of the finished runs that they do not hold.

        Raises:
            UserError: a log cannot be written, as in the other methods.
        """
        for log in self._logs:
            with _one_sentence(log):
                log.open()
                for row in rows:
                    if not log.holds(row):
                        log.add(row, self._record.read_trace(row["run_id"]))

    def add(self, row: Row) -> None:
        """Writes a run that has just finished."""
        for log in self._logs:
            with _one_sentence(log):
                log.add(row, self._record.read_trace(row["run_id"]))

    def complete(self, rows: list[Row]) -> None:
        """Adds `steps_to_target` to the runs that have it."""
        for log in self._logs:
            with _one_sentence(log):
                for row in rows:
                    if row["steps_to_target"] is not None:
                        log.complete(row["run_id"], row["steps_to_target"])


def _make(name: str, record: Record) -> RunLog:
    if name == "tensorboard":
        from ...experiment.logs.tensorboard import TensorBoardLog

        return TensorBoardLog(record.folder / "tensorboard")
    if name == "mlflow":
        from ...experiment.logs.mlflow import MlflowLog

        return MlflowLog(record)
    raise UserError(f"unknown log {name!r}, --log, give some of {', '.join(LOGS)}")


@contextmanager
def _one_sentence(log: RunLog) -> Iterator[None]:
    try:
        yield
    except log.errors as error:
        raise UserError(
            f"the log cannot be written ({quote_error(error)}), {log.where}, "
            "make room there or leave it out of --log, and continue with --resume"
        ) from error
