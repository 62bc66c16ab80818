"""A set of 8 GB trained under 1.5 GB of memory: writes the table in docs/streaming.md.

    python benchmarks/streamed_memory.py [--gigabytes 8] [--formats parquet,npy] [--scratch FOLDER]

For each format a set is generated shard by shard in a scratch folder, which is removed afterwards. A process of its own
then does what `batchnorm study` does with it: the first pass over all rows, then two runs (`none` and `batch`) of one
whole epoch each, side by side in two worker processes. Meanwhile this process, which is not counted, reads the memory
of that one and of all its children ten times a second from /proc (Linux). After that, unwatched, the rate of training
on the streamed set is compared with the rate on its first shard held in memory, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.experiment.data.dataset import Dataset
from batchnorm.experiment.data.opening import load
from batchnorm.experiment.design.plan import make_plan
from batchnorm.experiment.engines.local import execute, fresh_workers, shared_data
from batchnorm.experiment.output.study_folder import Record
from batchnorm.experiment.training.networks import Architecture
from batchnorm.experiment.training.train import train

PAGE = Path(__file__).parents[1] / "docs" / "streaming.md"
MARKS = ("<!-- memory:begin -->", "<!-- memory:end -->")
FEATURES, CLASSES, BATCH = 256, 10, 1024
SHARD_ROWS, ROW_GROUP = 2**17, 2**14
GIGABYTE = 10**9


def shards(rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (number, x, y): ten overlapping classes of float32 numbers, means far from 0 and spreads from 1 to 100."""
    shared = np.random.default_rng(0)
    centers = shared.normal(scale=0.2, size=(CLASSES, FEATURES)).astype(np.float32)
    scale = np.geomspace(1, 100, FEATURES, dtype=np.float32)
    for number in range(-(-rows // SHARD_ROWS)):
        generator = np.random.default_rng([1, number])
        count = min(SHARD_ROWS, rows - number * SHARD_ROWS)
        y = generator.integers(0, CLASSES, count)
        x = generator.standard_normal((count, FEATURES), dtype=np.float32)
        yield number, (x + centers[y]) * scale + 10 * scale, y


def write_parquet(folder: Path, number: int, x: np.ndarray, y: np.ndarray) -> None:
    """Writes a column a feature."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({**{f"f{k}": np.ascontiguousarray(x[:, k]) for k in range(FEATURES)}, "label": y})
    path = folder / f"{number:04d}.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=ROW_GROUP, use_dictionary=False, compression="none")


def write_npy(folder: Path, number: int, x: np.ndarray, y: np.ndarray) -> None:
    """Writes a pair of arrays."""
    np.save(folder / f"{number:04d}_x.npy", x)
    np.save(folder / f"{number:04d}_y.npy", y)


WRITERS: dict[str, Callable[[Path, int, np.ndarray, np.ndarray], None]] = {"parquet": write_parquet, "npy": write_npy}


def generate(folder: Path, kind: str, rows: int) -> int:
    """Writes the set and returns its bytes on disk."""
    for number, x, y in shards(rows):
        WRITERS[kind](folder, number, x, y)
    return sum(file.stat().st_size for file in folder.iterdir())


def train_epoch(data: Dataset) -> dict[str, Any]:
    """Trains two runs for one epoch each, as the study does, and returns what came of it."""
    steps = data.size("train") // BATCH
    plan = make_plan("mlp", "none,batch", lrs=[0.1], batch_size=BATCH, steps=steps)
    runs = [run for run in plan.runs_at_base() if run.seed == plan.measure_seeds[0]]
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out, shared_data(data) as held, fresh_workers():
        Record(Path(out)).begin({}, resume=False)
        execute(runs, Architecture("mlp", data.shape, data.classes, BATCH), held, Path(out), 2, rows.append)
    return {
        "train_rate": sum(row["steps"] for row in rows) * BATCH / (time.perf_counter() - started),
        "accuracy": {row["arm"]: row["test_accuracy"] for row in rows},
        "seconds": [row["seconds"] for row in rows],
    }


def compare_rates(streamed: Dataset, held: Dataset, repeats: int = 5, steps: int = 500) -> dict[str, float]:
    """Returns the median of streamed over in-memory samples a second, both timed in turn on one thread."""
    architecture = Architecture("mlp", (FEATURES,), CLASSES, BATCH)
    run = make_plan("mlp", "none,batch", lrs=[0.1], batch_size=BATCH, steps=steps).runs_at_base()[-1]
    train(replace(run, steps=10), architecture, held)  # the first call pays for torch's lazy imports
    rates = [
        [steps * BATCH / train(run, architecture, data)[0]["seconds"] for data in (streamed, held)]
        for _ in range(repeats)
    ]
    return {
        "ratio": statistics.median(a / b for a, b in rates),
        "streamed_rate": statistics.median(a for a, _ in rates),
        "held_rate": statistics.median(b for _, b in rates),
    }


def measured_process(folder: Path) -> None:
    """Prints two lines of JSON: what is measured while the memory is watched, and what is measured after that."""
    started = time.perf_counter()
    data = load(str(folder))
    seconds = time.perf_counter() - started
    described: dict[str, Any] = data.describe()
    first = {
        "samples": described["samples"],
        "survey_rate": described["samples"] / seconds,
        "order": described["order"],
    }
    print(json.dumps({**first, **train_epoch(data)}), flush=True)
    shard = sorted(file for file in folder.iterdir() if not file.stem.endswith("y"))[0]
    held = load(str(shard))
    assert [type(each).__name__ for each in (data, held)] == ["StreamedDataset", "Dataset"]
    print(json.dumps(compare_rates(data, held)), flush=True)


class Memory:
    """The largest memory of a process and all its descendants, in MiB, as /proc shows it at each look."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.rss = self.pss = self.highest = self.processes = 0

    def look(self) -> None:
        """Takes note of the memory at this moment; `highest` is the kernel's own record of the largest process."""
        found = [self._of(pid) for pid in self._family()]
        self.rss = max(self.rss, sum(rss for rss, _, _ in found))
        self.pss = max(self.pss, sum(pss for _, pss, _ in found))
        self.highest = max([self.highest, *(highest for _, _, highest in found)])
        self.processes = max(self.processes, len(found))

    def _family(self) -> list[int]:
        family = [self._pid]
        for pid in family:  # grows on the way
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    family += [int(child) for child in children.read_text().split()]
                except OSError:
                    continue
        return family

    @staticmethod
    def _of(pid: int) -> tuple[int, int, int]:
        try:
            rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text())
            status = _kilobytes(Path(f"/proc/{pid}/status").read_text())
        except OSError:  # it has just ended
            return 0, 0, 0
        return rollup.get("Rss", 0) // 1024, rollup.get("Pss", 0) // 1024, status.get("VmHWM", 0) // 1024


def _kilobytes(text: str) -> dict[str, int]:
    words = [line.split() for line in text.splitlines() if line.endswith("kB")]
    return {name.rstrip(":"): int(value) for name, value, _ in words}


def watch(folder: Path) -> tuple[dict[str, Any], Memory]:
    """Runs the measured process; returns what it prints, and its memory until its first line."""
    command = [sys.executable, __file__, "--measured", "--scratch", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        memory = Memory(process.pid)
        while not select.select([process.stdout], [], [], 0.1)[0]:
            memory.look()
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"the measurement failed with exit code {process.returncode}")
    return {**json.loads(lines[0]), **json.loads(lines[1])}, memory


def measure(kind: str, gigabytes: float, scratch: Path | None) -> str:
    """Returns the table's row for a format."""
    rows = int(gigabytes * GIGABYTE) // (4 * FEATURES) + 1
    room = shutil.disk_usage(scratch or tempfile.gettempdir()).free
    if room < 1.2 * gigabytes * GIGABYTE:
        raise SystemExit(f"{room / GIGABYTE:.1f} GB free for a set of {gigabytes} GB: give --scratch on a larger disk")
    with tempfile.TemporaryDirectory(prefix="batchnorm-streamed-", dir=scratch) as name:
        size = generate(Path(name), kind, rows)
        took, memory = watch(Path(name))
    print(json.dumps({"kind": kind, "bytes": size, **took, **vars(memory)}), flush=True)
    return (
        f"| {kind} | {size / GIGABYTE:.2f} GB, {took['samples']:,} | {memory.pss:,} | {memory.rss:,} | "
        f"{memory.highest:,} | {took['survey_rate']:,.0f} | {took['train_rate']:,.0f} | {took['ratio']:.2f} | "
        f"{took['accuracy']['none']:.1%}, {took['accuracy']['batch']:.1%} | {took['order']['variance_ratio']:.2f} |"
    )


def main() -> None:
    """Measures and writes the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the samples (default 8)")
    parser.add_argument("--formats", default="parquet,npy", help="of " + ", ".join(WRITERS))
    parser.add_argument("--scratch", type=Path, help="folder for the set (default: the system's)")
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measured:
        measured_process(arguments.scratch)
        return
    table = []
    for kind in arguments.formats.split(","):
        table.append(measure(kind, arguments.gigabytes, arguments.scratch))
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        PAGE.write_text(
            before + "\n".join([MARKS[0], *_lines(table, arguments.formats), MARKS[1]]) + after, encoding="utf-8"
        )


def _lines(table: list[str], formats: str) -> list[str]:
    return [
        "| format | size, samples | PSS, all | RSS, all | VmHWM, largest | first pass | training | against memory "
        "| accuracy | order |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *table,
        "",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}. Made by `python benchmarks/streamed_memory.py --formats {formats}`.",
    ]


if __name__ == "__main__":
    main()
