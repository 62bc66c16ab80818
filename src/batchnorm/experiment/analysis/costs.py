"""What one update costs in seconds.

The training runs are not timed for this: they share the machine with each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from ..data.dataset import Dataset
from ..training.networks import Architecture
from ..training.optimizers import make_optimizer
from ..training.runs import Run
from ..training.train import one_thread_deterministic, update

ROUNDS = 5
LEAST_UPDATES, LEAST_SECONDS = 5, 0.02
WARM_UP = 2


def update_seconds(runs: Iterable[Run], architecture: Architecture, data: Dataset) -> dict[Run, float]:
    """Return the seconds of one update of each run: batch drawn, forward, backward, optimizer.

    On one thread, as the runs are trained, and in rounds over all runs: the quickest update, as timeit has it, for what
    else the machine does only ever adds to a time. One network is alive at a time.
    """
    times: dict[Run, list[float]] = {run: [] for run in runs}
    with one_thread_deterministic():
        for _ in range(ROUNDS):
            for run, taken in times.items():
                taken += _timed(run, architecture, data)
    return {run: min(taken) for run, taken in times.items()}


def _timed(run: Run, architecture: Architecture, data: Dataset) -> list[float]:
    model = replace(architecture, batch_size=run.batch_size).build(run.arm, run.seed).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(run.optimizer, parameters, run.lr, run.weight_decay)
    batches = data.batches(run.batch_size, run.seed)
    taken: list[float] = []
    while len(taken) < WARM_UP + LEAST_UPDATES or sum(taken[WARM_UP:]) < LEAST_SECONDS:
        started = time.perf_counter()
        update(model, optimizer, *next(batches))
        taken.append(time.perf_counter() - started)
    return taken[WARM_UP:]
