"""`--engine ray` against `--engine local` on the same runs, in turn; writes its part of docs/scale.md.

    python -m benchmarks.ray_overhead [--repeats 3]

Both with two workers of one thread, started anew each time, and with runs of one step, so that what the engine adds is
most of what is timed. Results are checked to be equal before any time counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from batchnorm.experiment.data.dataset import Dataset
from batchnorm.experiment.data.opening import load
from batchnorm.experiment.design.plan import make_plan
from batchnorm.experiment.engines.choice import open_engine
from batchnorm.experiment.output.study_folder import Record
from batchnorm.experiment.training.networks import Architecture
from batchnorm.experiment.training.runs import Run
from batchnorm.experiment.training.train import train
from benchmarks.marked import made_by, write_part

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
Times = tuple[float, float, float]
WORKERS = 2


def timed(engine: str, runs: list[Run], architecture: Architecture, data: Dataset) -> tuple[Times, dict[str, float]]:
    """Returns an engine's start, its share of each further run, and its stop, in seconds; and the results.

    A run's own seconds are taken off, so that what disturbs the training on a busy machine cancels: between the first
    and the last result each worker was either training or waiting for the engine.
    """
    rows: list[dict[str, Any]] = []
    finished: list[float] = []

    def take(row: dict[str, Any]) -> None:
        finished.append(time.perf_counter())
        rows.append(row)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        Record(Path(out)).begin({}, resume=False)
        with open_engine(engine, data, architecture, Path(out), WORKERS, None) as execute:
            execute(runs, take)
    ended = time.perf_counter()
    k = len(runs) // 4  # by then every worker is past its first run, which pays for torch's lazy imports
    waiting = WORKERS * (finished[-1] - finished[k]) - sum(row["seconds"] for row in rows[k + 1 :])
    times = finished[0] - started - rows[0]["seconds"], waiting / (len(runs) - k - 1), ended - finished[-1]
    return times, {row["run_id"]: row["test_accuracy"] for row in rows}


def main() -> None:
    """Times both and writes the part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    data = load("digits")
    architecture = Architecture("mlp", data.shape, data.classes, 60)
    runs = make_plan("mlp", "none,batch", steps=1).runs_at_base()
    train(runs[0], architecture, data)  # the first call of a process pays for torch's lazy imports
    taken: dict[str, list[Times]] = {"local": [], "ray": []}
    for _ in range(given.repeats):
        results = []
        for engine, times in taken.items():
            seconds, accuracies = timed(engine, runs, architecture, data)
            times.append(seconds)
            results.append(accuracies)
            print(engine, " ".join(f"{value:.3f}" for value in seconds), flush=True)
        assert results[0] == results[1], "Ray gives other results"
    lines = ["| engine | start, s | a run, ms | stop, s |", "|---|---|---|---|"]
    for engine, times in taken.items():
        start, run, stop = zip(*times, strict=True)
        lines.append(f"| {engine} | {_cell(start)} | {_cell([1000 * value for value in run], 0)} | {_cell(stop)} |")
    command = f"python -m benchmarks.ray_overhead --repeats {given.repeats}"
    text = f"""{len(runs)} runs of one step with two workers, the engines in turn, {given.repeats} times each: median
(least – most) of what the engine adds. Start: to the first result, less its training; a run: what a worker waits for
each further one; stop: from the last result.

"""
    text += "\n".join(lines)
    write_part(PAGE, "ray", f"{text}\n\n{made_by(command, os.cpu_count() or 1)} Ray {ray.__version__}.")


def _cell(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
