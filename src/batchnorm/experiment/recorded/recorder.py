"""What writes runs from anyone's loop: a run's rows appear in the file together, when the run has ended well."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from filelock import FileLock

from ...errors import UserError, quote_error
from ..output.files import write_whole
from .long_table import NEEDED, NUMERIC, SPLITS

_FIXED = (*NEEDED, "split")


class StudyRecorder:
    """Record one training run in a table that `analyze` reads.

    A context manager: what is logged inside becomes rows of the CSV file at `path` when the block ends without an
    exception. A run that fails leaves nothing, so that a row stands for a whole run and can be repeated. Processes may
    write to one path at the same time; settings that earlier runs did not have become new columns.

    Args:
        path: the CSV file; made where it is not there.
        arm: what is compared, such as ``batch`` or ``as_written``.
        seed: of this run, at least 0.
        **settings: what else tells this run from the others, such as ``lr=0.1``.

    Raises:
        UserError: the arm, the seed or a setting is unusable, or the file is no table of runs or holds this run.
    """

    def __init__(self, path: str | os.PathLike[str], *, arm: str, seed: int, **settings: Any) -> None:
        self._path = Path(path)
        where = f"StudyRecorder(path={self._path})"
        if not str(arm).strip():
            raise UserError(f"an empty arm, {where}, name what this run is to be compared as")
        if isinstance(seed, bool) or int(seed) != seed or seed < 0:
            raise UserError(f"seed {seed!r}, {where}, give a whole number from 0 on")
        if taken := sorted({"split", "metric", "step"} & set(settings)):
            raise UserError(f"a setting named {taken[0]}, {where}, give it another name: {taken[0]} is logged")
        for name in NUMERIC:
            if name in settings and not isinstance(settings[name], (int, float)):
                raise UserError(f"{name} is {settings[name]!r}, {where}, give a number")
        self._run = {"arm": str(arm).strip(), "seed": str(int(seed)), **{k: _cell(v) for k, v in settings.items()}}
        self._values: dict[tuple[str, int], float] = {}
        self._lock = FileLock(f"{self._path}.lock")

    def __enter__(self) -> StudyRecorder:
        """Refuse a run that the file already holds, before anything is trained."""
        with self._guarded():
            self._check_new(self._read())
        return self

    def log(self, step: int, metric: float, split: Literal["val", "test"] = "val") -> None:
        """Note the metric after a step; a second value of one step and split takes the place of the first.

        Args:
            step: optimizer steps taken, at least 0.
            metric: a number, or a tensor of one; NaN or infinity says that the run has diverged.
            split: whether the value is of validation or of test data.

        Raises:
            UserError: a step, a value or a split that is none.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r}, StudyRecorder.log(split=…), give val or test")
        try:
            number, at = float(metric), int(step)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"step {str(step)[:40]!r} with metric {str(metric)[:40]!r}, StudyRecorder.log, give two numbers"
            ) from error
        if at != step or at < 0:
            raise UserError(f"step {step!r}, StudyRecorder.log(step=…), give a whole number from 0 on")
        self._values[split, at] = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._values:
            self._write()

    def _guarded(self) -> _Guard:
        return _Guard(self._lock, self._path)

    def _write(self) -> None:
        rows = [
            {**self._run, "step": str(step), "metric": repr(value), "split": split}
            for (split, step), value in sorted(self._values.items(), key=lambda item: item[0][1])
        ]
        with self._guarded():
            header, held = self._read()
            self._check_new((header, held))
            columns = list(header) or [*_FIXED]
            columns += [name for name in self._run if name not in columns]
            if columns != header:  # a new file, or a setting that earlier runs did not have
                write_whole(self._path, _csv([columns, *([row.get(name, "") for name in columns] for row in held)]))
            _append(self._path, _csv([row.get(name, "") for name in columns] for row in rows))

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Return the header and the rows of the file, nothing where it is not there."""
        if not self._path.exists():
            return [], []
        with self._path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        header = list(reader.fieldnames or [])
        if missing := [name for name in _FIXED if header and name not in header]:
            raise UserError(
                f"no column {', '.join(missing)}, StudyRecorder(path={self._path}), give a file that a recorder has "
                "written, or a new one"
            )
        return header, rows

    def _check_new(self, held: tuple[list[str], list[dict[str, str]]]) -> None:
        header, rows = held
        names = {*self._run, *header} - {"step", "metric", "split"}
        if any(all((row.get(name) or "") == self._run.get(name, "") for name in names) for row in rows):
            told = ", ".join(f"{name} {value}" for name, value in self._run.items())
            raise UserError(
                f"a run of {told} is there already, StudyRecorder(path={self._path}), "
                "give this one another seed or a setting that tells it from the other"
            )


class _Guard:
    """The file's lock, held; what the disk refuses is one sentence."""

    def __init__(self, lock: FileLock, path: Path) -> None:
        self._lock, self._path = lock, path

    def __enter__(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise self._refusal(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if isinstance(error, (OSError, csv.Error, UnicodeDecodeError)):
            raise self._refusal(error) from error

    def _refusal(self, error: BaseException) -> UserError:
        return UserError(
            f"cannot be written ({quote_error(error)}), StudyRecorder(path={self._path}), give a file that can"
        )


def _append(path: Path, text: str) -> None:
    """Add rows in one write; one that the disk cuts short is taken back."""
    with path.open("ab", buffering=0) as file:
        before, data = file.seek(0, os.SEEK_END), text.encode()
        try:
            if file.write(data) < len(data):
                raise OSError("the disk took only a part")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _cell(value: Any) -> str:
    return repr(float(value)) if isinstance(value, float) else str(value)


def _csv(rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
