"""The engine that `study(engine=…)` names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from ...errors import UserError
from ..data.dataset import Dataset
from ..training.networks import Architecture
from .base import Execute, available_workers
from .local import local_engine

ENGINES = ("local", "ray")


def check_engine(name: str, workers: int | None, address: str | None) -> None:
    """Refuse what cannot run, before anything is loaded or written.

    Raises:
        UserError: an unknown engine, no workers, an address without Ray, or one at which no Ray answers.
    """
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}, study(engine=…), give one of {', '.join(ENGINES)}")
    if workers is not None and workers < 1:
        raise UserError(f"{workers} workers, study(workers=…), give at least 1")
    if name == "ray":
        from .ray import check_address

        check_address(address)
    elif address is not None:
        raise UserError(
            f"the {name} engine has no address, study(address={address}), leave it out or add study(engine=ray)"
        )


def open_engine(
    name: str, data: Dataset, architecture: Architecture, out: Path, workers: int | None, address: str | None
) -> AbstractContextManager[Execute]:
    """Return the engine that `check_engine` has accepted; entered, it gives `execute(runs, on_finished)`.

    `execute` trains every run, leaves its trace and row in `out` and calls `on_finished` with each row.
    """
    if name == "ray":
        from .ray import ray_engine

        return ray_engine(data, architecture, out, workers, address)
    return local_engine(data, architecture, out, workers or available_workers())
