"""Runs side by side: processes of one thread each, every finished run on disk before its process takes the next.

An engine is a context that gives one function: `execute(runs, on_finished)`. This file holds the local one; Ray's is in
ray_engine.py.

joblib's loky is the engine because it survives what multiprocessing.Pool hangs on (a worker killed for memory)
and because it needs no ``if __name__ == "__main__"`` in a user's script.
"""

from __future__ import annotations

import functools
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, quote_error
from ..experiment.data import Dataset
from ..experiment.networks import Architecture
from ..experiment.plan import Run
from ..experiment.record import Record

ENGINES = ("local", "ray")
Row = dict[str, Any]
OnFinished = Callable[[Row], None]
Execute = Callable[[Sequence[Run], OnFinished], None]


def check_engine(name: str, workers: int | None, address: str | None) -> None:
    """Refuses what cannot run, before anything is loaded or written.

    Raises:
        UserError: an unknown engine, no workers, an address without Ray, or one at which no Ray answers.
    """
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}, --engine, give one of {', '.join(ENGINES)}")
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers, --workers, give at least 1")
    if name == "ray":
        from ..experiment.ray_engine import check_address

        check_address(address)
    elif address is not None:
        raise UserError(f"the {name} engine has no address, --address {address}, leave it out or add --engine ray")


def open_engine(
    name: str, data: Dataset, architecture: Architecture, out: Path, workers: int | None, address: str | None
) -> AbstractContextManager[Execute]:
    """Returns the engine that `check_engine` has accepted; entered, it gives `execute(runs, on_finished)`.

    `execute` trains every run, leaves its trace and row in `out` and calls `on_finished` with each row.
    """
    if name == "ray":
        from ..experiment.ray_engine import ray_engine

        return ray_engine(data, architecture, out, workers, address)
    return local_engine(data, architecture, out, workers or available_workers())


@contextmanager
def local_engine(data: Dataset, architecture: Architecture, out: Path, workers: int) -> Iterator[Execute]:
    """Gives the `execute` of this machine's processes."""
    with shared_data(data) as folder, fresh_workers():
        yield lambda runs, on_finished: execute(runs, architecture, folder, out, workers, on_finished)


def available_workers() -> int:
    """Returns the number of cores that this process may use (affinity and container limits counted)."""
    from joblib import cpu_count

    return int(cpu_count())


@contextmanager
def shared_data(data: Dataset) -> Iterator[Path]:
    """Writes the data once for all workers, which map it instead of receiving a copy with each run.

    Of streamed data only the held-out parts are written, with a description of where the others are.

    Raises:
        UserError: there is no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="batchnorm-study-", ignore_cleanup_errors=True) as folder:
        try:
            data.save(Path(folder))
        except OSError as error:
            raise UserError(
                f"the workers' data cannot be written ({quote_error(error)}), {folder}, make room or set TMPDIR"
            ) from error
        yield Path(folder)


@contextmanager
def fresh_workers() -> Iterator[None]:
    """Makes sure that the block's processes are its own, and that none of them outlives it.

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
    """Trains every run and leaves its trace and row in `out`, calling `on_finished` with each row.

    Raises:
        UserError: a run failed, or a worker process died; the runs finished until then stay on disk.
    """
    if workers == 1 or len(runs) <= 1:
        for run in runs:
            on_finished(run_one(run, architecture, data_folder, out))
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import BrokenProcessPool

    parallel = Parallel(
        n_jobs=min(workers, len(runs)),
        backend="loky",
        batch_size=1,
        pre_dispatch="2*n_jobs",
        return_as="generator_unordered",
    )
    tasks = (delayed(_run_in_worker)(run, architecture, data_folder, out) for run in runs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loky's remarks on workers that leave early
            for row in parallel(tasks):
                on_finished(row)
    except BrokenProcessPool as error:  # its message is a page of advice; the cause, where there is one, is short
        cause = quote_error(error.__cause__) if error.__cause__ else "out of memory?"
        raise UserError(
            f"a worker process died ({cause}), --workers {workers}, continue with --resume and fewer workers"
        ) from error


def _stop_workers() -> None:
    from joblib.externals.loky import get_reusable_executor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above: here they are told to
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _run_in_worker(run: Run, architecture: Architecture, data_folder: Path, out: Path) -> Row:
    # Ctrl-C reaches the whole process group; the parent alone answers it, and then ends the workers.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return run_one(run, architecture, data_folder, out)


def run_one(run: Run, architecture: Architecture, data_folder: Path, out: Path) -> Row:
    """Trains one run, puts it on disk and returns its row.

    Raises:
        UserError: whatever went wrong, in one sentence, because nothing else crosses to the user.
    """
    row, trace = train_one(run, architecture, _open_once(data_folder))
    Record(out).add(row, trace)
    return row


def train_one(run: Run, architecture: Architecture, data: Dataset) -> tuple[Row, dict[str, Any]]:
    """Returns the row and the trace of one run.

    Raises:
        UserError: the network failed, in one sentence.
    """
    from ..experiment.train import train

    try:
        return train(run, architecture, data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"training fails ({quote_error(error)}), --model {architecture.model} in run {run.run_id}, "
            "correct the network and start again"
        ) from error


@functools.lru_cache(maxsize=1)
def _open_once(data_folder: Path) -> Dataset:
    return Dataset.open(data_folder)
