"""`--engine ray` against `--engine local` on the same runs, in turn; writes its part of docs/scale.md.

    python -m benchmarks.ray_overhead [--runs 40] [--repeats 3]

Both with two workers of one thread, started anew each time. Results are checked to be equal before any time counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from batchnorm.experiment.data import Dataset, load
from batchnorm.experiment.engine import open_engine
from batchnorm.experiment.networks import Architecture
from batchnorm.experiment.plan import Run, make_plan
from batchnorm.experiment.record import Record
from batchnorm.experiment.train import train
from benchmarks.marked import made_by, write_part

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
Times = tuple[float, float, float]


def timed(engine: str, runs: list[Run], architecture: Architecture, data: Dataset) -> tuple[Times, dict[str, float]]:
    """Returns the seconds to the first result, for each further one, and in all, stopping included; and the results."""
    accuracies: dict[str, float] = {}
    finished: list[float] = []

    def take(row: dict[str, Any]) -> None:
        finished.append(time.perf_counter())
        accuracies[row["run_id"]] = row["test_accuracy"]

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        Record(Path(out)).begin({}, resume=False)
        with open_engine(engine, data, architecture, Path(out), 2, None) as execute:
            execute(runs, take)
    ended = time.perf_counter()
    return (finished[0] - started, (finished[-1] - finished[0]) / (len(runs) - 1), ended - started), accuracies


def main() -> None:
    """Times both and writes the part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    data = load("digits")
    architecture = Architecture("mlp", data.shape, data.classes, 60)
    runs = make_plan("mlp", "none,batch").runs_at_base()[::2][: given.runs]
    train(runs[0], architecture, data)  # the first call of a process pays for torch's lazy imports
    taken: dict[str, list[Times]] = {"local": [], "ray": []}
    for _ in range(given.repeats):
        results = []
        for engine, times in taken.items():
            seconds, accuracies = timed(engine, runs, architecture, data)
            times.append(seconds)
            results.append(accuracies)
            print(engine, " ".join(f"{value:.2f}" for value in seconds), flush=True)
        assert results[0] == results[1], "Ray gives other results"
    rows = []
    for engine, times in taken.items():
        first, each, total = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(f"| {engine} | {first:.1f} s | {each:.2f} s | {total:.1f} s |")
    ratios = [
        [ours[k] / theirs[k] for ours, theirs in zip(taken["ray"], taken["local"], strict=True)] for k in range(3)
    ]
    middle = " | ".join(f"{statistics.median(ratio):.2f}" for ratio in ratios)
    spread = " | ".join(f"{min(ratio):.2f} – {max(ratio):.2f}" for ratio in ratios)
    command = f"python -m benchmarks.ray_overhead --runs {given.runs} --repeats {given.repeats}"
    table = "\n".join([
        "| engine | first result after | each further one | all, stopping included |", "|---|---|---|---|",
        *rows, f"| ray / local | {middle} |", f"| its range | {spread} |",
    ])  # fmt: skip
    text = f"Medians of {given.repeats} repeats in turn, {len(runs)} runs of the default study, two workers.\n\n{table}"
    write_part(PAGE, "ray", f"{text}\n\n{made_by(command, os.cpu_count() or 1)} Ray {ray.__version__}.")


if __name__ == "__main__":
    main()
