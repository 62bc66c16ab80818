"""Runs on Ray: on the machines of a cluster, or on a Ray started for the study.

The data go once into Ray's object store, from where every node maps them. A run comes back as values and this process,
the driver, alone writes them: workers need no disk in common with it. Ray repeats the runs of a worker or node that is
lost; a driver that is lost is started again with ``study(resume=True)``.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UserError, quote_error
from ..data.dataset import Dataset
from ..output.study_folder import Record, Row
from ..training.networks import BUILT_IN, Architecture
from ..training.runs import Run
from .base import Execute, OnFinished, available_workers, train_one

# Ray reads both when it is imported: no usage statistics are sent, and Ray's long messages about a lost worker stay in
# its log files instead of this process's stdout (`_quiet` does the same for a Ray that was imported before).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray

ANSWER_WITHIN = 5.0  # seconds
# HTTP/2's preface and an empty SETTINGS frame, which every gRPC server (as Ray's is) answers with its own SETTINGS.
_HELLO, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", 4


def check_address(address: str | None) -> None:
    """Refuse an address at which no Ray answers, within seconds; ``ray.init`` would try for minutes and then exit.

    Raises:
        UserError: the address is none, or nobody answers there.
    """
    if address in (None, "auto"):
        return
    host, _, port = str(address).removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"no address of a Ray cluster, study(address={address}), give HOST:PORT or auto")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false"):
                return  # Ray checks who answers, with its certificates
            connection.sendall(_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        raise _unreachable(address, error) from error
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise UserError(f"what answers there is not Ray, study(address={address}), give the head node's HOST:PORT")


def _unreachable(address: str | None, error: BaseException) -> UserError:
    where = f"study(address={address})" if address else "study(engine=ray)"
    return UserError(f"no Ray to run on ({quote_error(error)}), {where}, start it there or leave the address out")


@contextmanager
def ray_engine(
    data: Dataset, architecture: Architecture, out: Path, workers: int | None, address: str | None
) -> Iterator[Execute]:
    """Yield the `execute` of Ray; it connects when the first run is to be trained."""
    record = Record(out)
    functions = [name for name in (architecture.model, data.function) if name and name not in BUILT_IN]
    with ExitStack() as stack:

        @cache
        def connect() -> tuple[Any, Any, int]:
            at_once = stack.enter_context(_connected(functions, workers, address))
            return _train, ray.put(data), at_once

        def execute(runs: Sequence[Run], on_finished: OnFinished) -> None:
            if runs:
                task, shared, at_once = connect()
                submissions = (task.remote(run, architecture, shared) for run in runs)
                for row, trace in _finished(submissions, at_once):
                    record.add(row, trace)
                    on_finished(row)

        yield execute


@contextmanager
def _connected(functions: list[str], workers: int | None, address: str | None) -> Iterator[int]:
    """Yield how many runs to hand to Ray at once; a connection that is there already is used and left."""
    if ray.is_initialized():
        yield workers or _twice_the_cpus()
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "runtime_env": _environment()}
    if address is None:
        # "local" and not None, which would join the cluster that RAY_ADDRESS names.
        options |= {"address": "local", "num_cpus": workers or available_workers(), "include_dashboard": False}
    else:
        options |= {"address": address}
        if functions:
            # Machines that cannot read this machine's disk are sent the modules or packages of the user's functions.
            names = dict.fromkeys(re.split("[.:]", function)[0] for function in functions)
            options["runtime_env"]["py_modules"] = [importlib.import_module(name) for name in names]
    with _quiet():
        try:
            try:
                ray.init(**options)
            except (SystemExit, Exception) as error:  # Ray exits the process when it gives up
                raise _unreachable(address, error) from error
            yield workers if workers and address else _twice_the_cpus()
        finally:
            ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Yield RAY_DEDUP_LOGS_SKIP_REGEX its effect for the block, also where Ray was imported before it was set."""
    try:
        from ray._private.ray_logging import stdout_deduplicator as printer
    except ImportError:  # not public in Ray: a version that has it elsewhere prints its messages
        yield
        return
    before = printer.skip_re
    printer.skip_re = re.compile(os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"])
    try:
        yield
    finally:
        printer.skip_re = before


def _twice_the_cpus() -> int:
    """Return enough to keep every CPU busy while results travel, and to show an autoscaler that more is wanted."""
    return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))


def _environment() -> dict[str, Any]:
    """Return the workers' environment: one thread each, and every folder that this process imports from.

    Folders of the interpreter itself are left out: another machine has its own. One that another machine lacks is
    skipped by Python.
    """
    own = {str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix)}
    folders = dict.fromkeys(str(Path(entry).resolve()) for entry in sys.path)
    ours = [folder for folder in folders if not any(Path(folder).is_relative_to(prefix) for prefix in own)]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(ours), "OMP_NUM_THREADS": "1"}}


# A worker that dies is replaced. An exception of the network is shown to the user: it would only come again.
@ray.remote(num_cpus=1, max_retries=3, retry_exceptions=False)
def _train(run: Run, architecture: Architecture, data: Dataset) -> tuple[Row, dict[str, Any]] | UserError:
    try:
        return train_one(run, architecture, data)
    except UserError as error:
        return error  # raised, it would come back inside a long message of Ray


def _finished(submissions: Iterator[Any], at_once: int) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Yield results as they come, drawing submissions so that Ray holds `at_once` runs at most.

    Raises:
        UserError: a run's own, or the line for what Ray gave up on.
    """
    waiting: list[Any] = []
    while True:
        try:
            waiting += islice(submissions, at_once - len(waiting))
            if not waiting:
                return
            [ready], waiting = ray.wait(waiting)
            result = ray.get(ready)
        except ray.exceptions.RayError as error:
            raise UserError(
                f"Ray lost a run for good ({quote_error(getattr(error, 'cause', None) or error)}), study(engine=ray), "
                "look after the cluster and continue with study(resume=True)"
            ) from error
        if isinstance(result, UserError):
            raise result
        yield result
