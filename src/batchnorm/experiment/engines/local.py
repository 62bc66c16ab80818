"""Runs on this machine: processes of one thread each, every finished run on disk before its process takes the next.

joblib's loky is the engine because it survives what multiprocessing.Pool hangs on (a worker killed for memory)
and because it needs no ``if __name__ == "__main__"`` in a user's script.
"""

from __future__ import annotations

import functools
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import joblib
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool

from ...errors import UserError, quote_error
from ..data.dataset import Dataset
from ..output.study_folder import Record, Row
from ..training.networks import Architecture
from ..training.runs import Run
from .base import Execute, OnFinished, train_one

_DATA = "data.joblib"


@contextmanager
def local_engine(data: Dataset, architecture: Architecture, out: Path, workers: int) -> Iterator[Execute]:
    """Yield the `execute` of this machine's processes."""
    with shared_data(data) as folder, fresh_workers():
        yield lambda runs, on_finished: execute(runs, architecture, folder, out, workers, on_finished)


@contextmanager
def shared_data(data: Dataset) -> Iterator[Path]:
    """Write the data once for all workers, which map the arrays instead of receiving a copy with each run.

    Of streamed data this is the held-out parts, and where the rows are.

    Raises:
        UserError: there is no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="batchnorm-study-", ignore_cleanup_errors=True) as folder:
        try:
            joblib.dump(data, Path(folder) / _DATA)
        except OSError as error:
            raise UserError(
                f"the workers' data cannot be written ({quote_error(error)}), {folder}, make room or set TMPDIR"
            ) from error
        yield Path(folder)


@contextmanager
def fresh_workers() -> Iterator[None]:
    """Make sure that the block's processes are its own, and that none of them outlives it.

    joblib keeps a pool between calls. Its processes would still stand in the folder and hold the modules of an
    earlier study: a network edited in between would be trained as it was.
    """
    _stop_workers()
    try:
        yield
    finally:
        _stop_workers()


def execute(
    runs: Sequence[Run],
    architecture: Architecture,
    data_folder: Path,
    out: Path,
    workers: int,
    on_finished: OnFinished,
) -> None:
    """Train every run and leaves its trace and row in `out`, calling `on_finished` with each row.

    Raises:
        UserError: a run failed, or a worker process died; the runs finished until then stay on disk.
    """
    if workers == 1 or len(runs) <= 1:
        for run in runs:
            on_finished(run_one(run, architecture, data_folder, out))
        return
    parallel = joblib.Parallel(
        n_jobs=min(workers, len(runs)),
        backend="loky",
        batch_size=1,
        pre_dispatch="2*n_jobs",
        return_as="generator_unordered",
    )
    tasks = (joblib.delayed(_run_in_worker)(run, architecture, data_folder, out) for run in runs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loky warns about workers that end early
            for row in parallel(tasks):
                on_finished(row)
    except BrokenProcessPool as error:  # its message is long; the cause, where there is one, is short
        cause = quote_error(error.__cause__) if error.__cause__ else "out of memory?"
        raise UserError(
            f"a worker process died ({cause}), study(workers={workers}), "
            "continue with study(resume=True) and fewer of them"
        ) from error


def _stop_workers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above: here they are stopped
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _run_in_worker(run: Run, architecture: Architecture, data_folder: Path, out: Path) -> Row:
    # Ctrl-C reaches the whole process group. Only the parent handles it, and then ends the workers.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return run_one(run, architecture, data_folder, out)


def run_one(run: Run, architecture: Architecture, data_folder: Path, out: Path) -> Row:
    """Train one run, puts it on disk and returns its row.

    Raises:
        UserError: whatever went wrong, in one sentence, because nothing else crosses to the user.
    """
    row, trace = train_one(run, architecture, open_shared(data_folder))
    Record(out).add(row, trace)
    return row


@functools.lru_cache(maxsize=1)
def open_shared(data_folder: Path) -> Dataset:
    """Return the data of `shared_data`, the arrays mapped copy-on-write: torch wants memory that could be written."""
    data: Dataset = joblib.load(data_folder / _DATA, mmap_mode="c")
    return data
