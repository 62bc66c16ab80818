"""The logs that `study(log=…)` names: runs are shown there besides the study's own files, which stay the record.

The driver writes them, a run at a time and after the run's row is on disk. A log that already holds a run's row is left
as it is, so that a resumed study adds what is missing and doubles nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ...errors import UserError, quote_error
from ..design.parsing import split_list
from ..output.study_folder import Record, Row
from .run_log import RunLog

LOGS = ("tensorboard", "mlflow")


class RunLogs:
    """All the logs that were asked for, and what is common to them: names, order, errors."""

    def __init__(self, names: str | Iterable[str], record: Record) -> None:
        self._record = record
        self._logs = [_make(name, record) for name in dict.fromkeys(split_list(names)) if name]

    def catch_up(self, rows: list[Row]) -> None:
        """Open the logs and write those finished runs that they do not hold.

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
        """Write a run that has just finished."""
        for log in self._logs:
            with _one_sentence(log):
                log.add(row, self._record.read_trace(row["run_id"]))

    def complete(self, rows: list[Row]) -> None:
        """Add `steps_to_target` to the runs that have it."""
        for log in self._logs:
            with _one_sentence(log):
                for row in rows:
                    if row["steps_to_target"] is not None:
                        log.complete(row["run_id"], row["steps_to_target"])


def _make(name: str, record: Record) -> RunLog:
    if name == "tensorboard":
        from .tensorboard import TensorBoardLog

        return TensorBoardLog(record.folder / "tensorboard")
    if name == "mlflow":
        from .mlflow import MlflowLog

        return MlflowLog(record)
    raise UserError(f"unknown log {name!r}, study(log=…), give some of {', '.join(LOGS)}")


@contextmanager
def _one_sentence(log: RunLog) -> Iterator[None]:
    try:
        yield
    except log.errors as error:
        raise UserError(
            f"the log cannot be written ({quote_error(error)}), {log.where}, "
            "make room there or leave it out of the logs, and continue with study(resume=True)"
        ) from error
