"""Runs as TensorBoard's event files: one folder a run, OUT/tensorboard/RUN_ID."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ..output.study_folder import Row
from .run_log import PARAMETERS, curves_of, finals_of

_COMPLETION = ".steps_to_target"  # ends the name of the event file that holds it


class TensorBoardLog:
    """Curves as scalars over steps; parameters and final metrics as hyperparameters (the HPARAMS table)."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder
        self._unfinished = folder / ".unfinished"

    def open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def holds(self, row: Row) -> bool:
        return (self._folder / row["run_id"]).is_dir()

    def add(self, row: Row, trace: dict[str, Any]) -> None:
        # A run appears by a rename, so that a study that is killed here leaves no incomplete run.
        finished = self._folder / row["run_id"]
        with _writer(self._unfinished) as writer:
            for name, step, value in curves_of(trace):
                writer.add_scalar(name, value, step)
            writer.add_hparams({name: row[name] for name in PARAMETERS}, finals_of(row), run_name=".")
        shutil.rmtree(finished, ignore_errors=True)
        self._unfinished.rename(finished)

    def complete(self, run_id: str, steps_to_target: float) -> None:
        if not any((self._folder / run_id).glob(f"*{_COMPLETION}")):
            with _writer(self._folder / run_id, filename_suffix=_COMPLETION) as writer:
                writer.add_scalar("steps_to_target", steps_to_target)


@contextmanager
def _writer(folder: Path, **options: Any) -> Iterator[SummaryWriter]:
    """Yield a writer whose thread prints no traceback for a full disk, because `flush` raises the error here too."""
    report = threading.excepthook
    threading.excepthook = lambda died: None if isinstance(died.exc_value, OSError) else report(died)
    try:
        with SummaryWriter(str(folder), **options) as writer:
            yield writer
            writer.flush()
    finally:
        threading.excepthook = report
