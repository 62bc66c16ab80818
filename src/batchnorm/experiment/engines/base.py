"""What all engines share: the types of what they run and return, and one training run as an engine calls it.

An engine is a context that gives one function, `execute(runs, on_finished)`: it trains every run, leaves the trace and
the row of each in the study's folder, and calls `on_finished` with each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...errors import UserError, quote_error
from ..data.dataset import Dataset
from ..output.study_folder import Row
from ..training.networks import Architecture
from ..training.runs import Run
from ..training.train import train

OnFinished = Callable[[Row], None]
Execute = Callable[[Sequence[Run], OnFinished], None]


def available_workers() -> int:
    """Return the number of cores that this process may use (affinity and container limits counted)."""
    from joblib import cpu_count  # here, because workers on a Ray cluster need not have joblib

    return int(cpu_count())


def train_one(run: Run, architecture: Architecture, data: Dataset) -> tuple[Row, dict[str, Any]]:
    """Return the row and the trace of one run.

    Raises:
        UserError: the network failed, in one sentence.
    """
    try:
        return train(run, architecture, data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"training fails ({quote_error(error)}), study(model={architecture.model}) in run {run.run_id}, "
            "correct the network and start again"
        ) from error
