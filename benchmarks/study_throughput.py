"""Two worker processes against a plain sequential loop of the same runs; writes docs/study-throughput.md.

    python benchmarks/study_throughput.py [--runs 24] [--repeats 3]

The loop trains in this process, on one thread as the workers do, without joblib, files or progress. Both sides
are timed in turn, and ratios of neighbors compared: a noisy machine disturbs neighbors alike. Starting the
workers is part of a study and therefore of the time. Results are checked to be equal before any time counts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from batchnorm.experiment.data.dataset import Dataset
from batchnorm.experiment.data.opening import load
from batchnorm.experiment.design.plan import make_plan
from batchnorm.experiment.engines.choice import open_engine
from batchnorm.experiment.output.provenance import library_commit
from batchnorm.experiment.output.study_folder import Record
from batchnorm.experiment.training.networks import Architecture
from batchnorm.experiment.training.runs import Run
from batchnorm.experiment.training.train import train

PAGE = Path(__file__).parents[1] / "docs" / "study-throughput.md"
Results = dict[str, tuple[float, float]]


def sequential(runs: list[Run], architecture: Architecture, data: Dataset) -> tuple[float, Results]:
    """Returns the seconds and the accuracies of a plain loop."""
    started = time.perf_counter()
    rows = [train(run, architecture, data)[0] for run in runs]
    return time.perf_counter() - started, _results(rows)


def side_by_side(
    runs: list[Run], architecture: Architecture, data: Dataset, engine: str = "local"
) -> tuple[float, Results]:
    """Returns the seconds and the accuracies of an engine of the study with two workers, start-up included."""
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        Record(Path(out)).begin({}, resume=False)
        with open_engine(engine, data, architecture, Path(out), 2, None) as execute:
            execute(runs, rows.append)
            seconds = time.perf_counter() - started
    return seconds, _results(rows)


def _results(rows: list[dict[str, Any]]) -> Results:
    return {row["run_id"]: (row["val_accuracy"], row["test_accuracy"]) for row in rows}


def main() -> None:
    """Times both and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="training runs a side (default 60)")
    parser.add_argument("--repeats", type=int, default=3, help="how often both sides are timed in turn (default 3)")
    arguments = parser.parse_args()
    data = load("digits")
    architecture = Architecture("mlp", data.shape, data.classes, 60)
    # Every other run of the default study, so that both arms and all rates are among them.
    runs = make_plan("mlp", "none,batch").runs_at_base()[::2][: arguments.runs]
    train(runs[0], architecture, data)  # the first call of a process pays for torch's lazy imports
    lines = []
    for _ in range(arguments.repeats):
        (loop, wanted), (pool, got) = (side(runs, architecture, data) for side in (sequential, side_by_side))
        assert got == wanted, "two workers give other results than the loop"
        lines.append((loop, pool, loop / pool))
        print(f"loop {loop:.1f} s, two workers {pool:.1f} s: {loop / pool:.2f} times", flush=True)
    PAGE.write_text(_page(len(runs), lines), encoding="utf-8")


def _page(runs: int, lines: list[tuple[float, float, float]]) -> str:
    table = "\n".join(f"| {loop:.1f} s | {pool:.1f} s | {ratio:.2f} |" for loop, pool, ratio in lines)
    return f"""# Throughput of the study with two workers

The same {runs} training runs of the default study, in turn: a plain sequential loop on one thread, and
`batchnorm study`'s engine with two workers of one thread each, the start of the workers included. Both give the
same accuracies to the last digit. Median: **{statistics.median(ratio for *_, ratio in lines):.2f} times** the loop.

| sequential loop | two workers | ratio |
|---|---|---|
{table}

{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, \
torch {torch.__version__}, commit {library_commit() or "unknown"}. Made by `python benchmarks/study_throughput.py`.
"""


if __name__ == "__main__":
    main()
