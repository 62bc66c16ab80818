"""What every log implements, and what the logs write of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from ..output.study_folder import COLUMNS, Row

CURVES = ("val_accuracy", "train_loss")
_FINALS = ("val_accuracy", "test_accuracy", "final_val_accuracy", "train_loss", "drift", "diverged", "seconds")
PARAMETERS = COLUMNS[1 : COLUMNS.index("steps_to_target")]


class RunLog(Protocol):
    """One place to show runs. `errors` are what it raises when it cannot be written, `where` is its address."""

    where: str
    errors: tuple[type[Exception], ...]

    def open(self) -> None:
        """Make sure that it can be written."""

    def holds(self, row: Row) -> bool:
        """Return whether the run is there as a whole."""

    def add(self, row: Row, trace: dict[str, Any]) -> None:
        """Write the run's parameters, curves and final metrics."""

    def complete(self, run_id: str, steps_to_target: float) -> None:
        """Add, once, what is known only after all runs."""


def curves_of(trace: dict[str, Any]) -> Iterator[tuple[str, int, float]]:
    """Yield (curve/NAME, step, value) for every evaluation that has one."""
    for name in CURVES:
        for step, value in zip(trace["steps"], trace[name], strict=True):
            if value is not None:
                yield f"curve/{name}", step, float(value)


def finals_of(row: Row) -> dict[str, float]:
    """Return the row's results under the names of runs.csv's columns, without those it does not have."""
    return {name: float(row[name]) for name in _FINALS if row[name] is not None}
