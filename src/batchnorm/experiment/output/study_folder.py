"""The study's folder: what is on disk, in which order it gets there, and what a resumed study may trust.

A run's trace is written before its row, each by one atomic step, and both before the process that trained it
takes the next run. So whatever kills the study, a row stands for a whole run; rows cut short are dropped.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UserError, quote_error
from .files import write_whole

COLUMNS = (
    *("run_id", "purpose", "arm", "seed", "lr", "weight_decay", "dropout", "batch_size", "optimizer", "steps"),
    *("steps_to_target", "val_accuracy", "test_accuracy", "final_val_accuracy", "train_loss", "drift"),
    *("diverged", "seconds"),
)
Row = dict[str, Any]
_WHOLE = ("seed", "batch_size", "steps")
_FLAGS = {"True": True, "False": False}
_TEXT = ("run_id", "purpose", "arm", "optimizer")


class Record:
    """One study's folder. Holds no state besides the path, so that worker processes can make their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs_csv = folder / "runs.csv"
        self.summary_json = folder / "summary.json"
        self.report = folder / "report.html"
        self.plan_json = folder / "plan.json"
        self._traces = folder / "traces"

    def begin(self, options: dict[str, Any], resume: bool) -> list[Row]:
        """Return the rows that are there already, after making sure that the folder is this study's.

        Args:
            options: all that decides what the runs are and what comes out of them, as JSON types.
            resume: whether rows may be there. Without it a folder that holds a study is refused, never overwritten.

        Raises:
            UserError: the folder cannot be written, or holds a study that must not be mixed with this one.
        """
        try:
            self._traces.mkdir(parents=True, exist_ok=True)
            held = self._held_options()
            rows = list(self.read_rows().values())
            if held is None or not rows:  # without a finished run there is nothing to lose
                write_whole(self.plan_json, json.dumps(options, indent=1, allow_nan=False))
                write_whole(self.runs_csv, _csv_text([COLUMNS]))
                return []
            if not resume:
                raise UserError(
                    f"a study is there already, study(out={self.folder}), continue it with "
                    "study(resume=True) or give another folder"
                )
            differing = sorted(key for key in {*held, *options} if held.get(key) != options.get(key))
            if differing:
                raise UserError(
                    f"a study with other {', '.join(differing)} is there, study(out={self.folder}), "
                    "repeat its options or give another folder"
                )
            self.rewrite(rows)
            return rows
        except OSError as error:
            raise UserError(
                f"cannot be written ({quote_error(error)}), study(out={self.folder}), give a folder that can"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError of the block, as of a full disk, into a UserError; complete rows stay.

        Raises:
            UserError: something cannot be written.
        """
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot be written ({quote_error(error)}), study(out={self.folder}), make room and continue with "
                "study(resume=True)"
            ) from error

    def _held_options(self) -> dict[str, Any] | None:
        if not self.plan_json.exists():
            if self.runs_csv.exists() or self.summary_json.exists():
                raise UserError(
                    f"files of another kind of study are there, study(out={self.folder}), give another folder"
                )
            return None
        try:
            held = json.loads(self.plan_json.read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise UserError(f"damaged, {self.plan_json}, give another folder")
        return held

    def read_rows(self) -> dict[str, Row]:
        """Return, by its run_id, each run's first complete row that has its trace."""
        rows: dict[str, Row] = {}
        if not self.runs_csv.exists():
            return rows
        with self.runs_csv.open(encoding="utf-8", newline="") as file:
            for cells in csv.reader(file):
                if len(cells) != len(COLUMNS) or cells[0] in rows or cells[0] == COLUMNS[0]:
                    continue
                try:
                    row = parse_row(cells)
                    self.read_trace(row["run_id"])
                except (ValueError, KeyError, OSError):
                    continue
                rows[row["run_id"]] = row
        return rows

    def add(self, row: Row, trace: dict[str, Any]) -> None:
        """Put a finished run on disk: its trace first, then its row, flushed to the device.

        Several processes add to one file: each row is a single write in append mode.
        """
        with self.writing():
            write_whole(self._trace_path(row["run_id"]), json.dumps(trace, allow_nan=False))
            line = _csv_text([[_cell(row[column]) for column in COLUMNS]]).encode()
            descriptor = os.open(self.runs_csv, os.O_WRONLY | os.O_APPEND)
            try:
                if os.write(descriptor, line) < len(line):  # a disk that fills up writes a part without an error
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rewrite(self, rows: Iterable[Row]) -> None:
        """Replace runs.csv by these rows."""
        cells = [[_cell(row[column]) for column in COLUMNS] for row in rows]
        write_whole(self.runs_csv, _csv_text([COLUMNS, *cells]))

    def read_trace(self, run_id: str) -> dict[str, Any]:
        """Return the trace of a run."""
        trace: dict[str, Any] = json.loads(self._trace_path(run_id).read_text(encoding="utf-8"))
        return trace

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json. A NaN in it would be a bug and raises, because JSON does not have it."""
        write_whole(self.summary_json, json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def _trace_path(self, run_id: str) -> Path:
        return self._traces / f"{run_id}.json"


def parse_row(cells: list[str]) -> dict[str, Any]:
    """Return a row of runs.csv with its types; an empty cell is None.

    Raises:
        ValueError, KeyError: a cell that does not parse.
    """
    row: Row = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
        if column in _TEXT:
            row[column] = cell
        elif column == "diverged":
            row[column] = _FLAGS[cell]
        elif cell == "":
            row[column] = None
        else:
            row[column] = int(cell) if column in _WHOLE else float(cell)
    return row


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _csv_text(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
