"""A set of 8 GB trained under 1.5 GB of memory: writes the table in docs/streaming.md.

    python benchmarks/streamed_memory.py [--gigabytes 8] [--formats parquet,npy] [--scratch FOLDER]

For each format a set is generated shard by shard in a scratch folder, which is removed afterwards. A process of its own
then does what `batchnorm study` does with it: the first pass over all rows, then two runs (`none` and `batch`) of one
whole epoch each, side by side in two worker processes. Meanwhile this process, which is not counted, reads the memory
of that one and of all its children ten times a second from /proc (Linux). Then, in the same way but in one process, the
rate at which batches of a streamed set are trained is compared with the rate of its first shard held in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

from batchnorm.experiment.provenance import library_commit

PAGE = Path(__file__).parents[1] / "docs" / "streaming.md"
MARKS = ("<!-- memory:begin -->", "<!-- memory:end -->")
FEATURES, CLASSES, BATCH = 256, 10, 256
SHARD_ROWS, ROW_GROUP = 2**17, 2**14
GIGABYTE = 10**9
MEBIBYTE = 2**20


def shards(rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (number, x, y): ten overlapping classes of float32 numbers, means far from 0 and spreads from 1 to 100."""
    shared = np.random.default_rng(0)
    centres = shared.normal(scale=0.2, size=(CLASSES, FEATURES)).astype(np.float32)
    scale = np.geomspace(1, 100, FEATURES, dtype=np.float32)
    for number in range(-(-rows // SHARD_ROWS)):
        generator = np.random.default_rng([1, number])
        count = min(SHARD_ROWS, rows - number * SHARD_ROWS)
        y = generator.integers(0, CLASSES, count)
        x = generator.standard_normal((count, FEATURES), dtype=np.float32)
        yield number, (x + centres[y]) * scale + 10 * scale, y


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


def train_epoch(folder: Path) -> dict[str, Any]:
    """Does what the study does with the set, one epoch in two runs, and returns what it took."""
    from batchnorm.experiment.data import load
    from batchnorm.experiment.engine import execute, fresh_workers, shared_data
    from batchnorm.experiment.networks import Architecture
    from batchnorm.experiment.plan import make_plan
    from batchnorm.experiment.record import Record

    started = time.perf_counter()
    data = load(str(folder))
    surveyed = time.perf_counter()
    steps = data.size("train") // BATCH
    plan = make_plan("mlp", "none,batch", lrs=[0.1], batch_size=BATCH, steps=steps)
    runs = [run for run in plan.runs_at_base() if run.seed == plan.measure_seeds[0]]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out, shared_data(data) as held, fresh_workers():
        Record(Path(out)).begin({}, resume=False)
        execute(runs, Architecture("mlp", data.shape, data.classes, BATCH), held, Path(out), 2, rows.append)
    seconds = time.perf_counter() - surveyed
    samples = sum(data.describe()[part] for part in ("train", "validation", "test"))  # type: ignore[misc]  # integers
    return {
        "samples": samples,
        "survey_rate": samples / (surveyed - started),
        "train_rate": sum(row["steps"] for row in rows) * BATCH / seconds,
        "steps": steps,
        "accuracy": {row["arm"]: row["test_accuracy"] for row in rows},
        "order": data.describe()["order"],
    }


def compare_rates(folder: Path, repeats: int = 5, steps: int = 2000) -> dict[str, float]:
    """Returns the median of streamed over in-memory samples a second, both timed in turn on one thread."""
    from batchnorm.experiment.data import load
    from batchnorm.experiment.networks import Architecture
    from batchnorm.experiment.plan import make_plan
    from batchnorm.experiment.train import train

    shard = sorted(file for file in folder.iterdir() if not file.stem.endswith("y"))[0]
    sets = {"streamed": load(str(folder)), "memory": load(str(shard))}
    assert [type(data).__name__ for data in sets.values()] == ["StreamedDataset", "Dataset"]
    architecture = Architecture("mlp", (FEATURES,), CLASSES, BATCH)
    run = make_plan("mlp", "none,batch", lrs=[0.1], batch_size=BATCH, steps=steps).runs_at_base()[-1]
    train(replace(run, steps=10), architecture, sets["memory"])  # the first call pays for torch's lazy imports
    rates: dict[str, list[float]] = {name: [] for name in sets}
    for _ in range(repeats):
        for name, data in sets.items():
            rates[name].append(steps * BATCH / train(run, architecture, data)[0]["seconds"])
    ratios = [a / b for a, b in zip(rates["streamed"], rates["memory"], strict=True)]
    return {"ratio": statistics.median(ratios), **{name: statistics.median(rate) for name, rate in rates.items()}}


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


def in_a_process(what: str, folder: Path) -> tuple[dict[str, Any], Memory]:
    """Runs one of the two measurements in a process of its own; returns what it prints, and its memory."""
    command = [sys.executable, __file__, "--measure", what, "--scratch", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        memory = Memory(process.pid)
        while process.poll() is None:
            memory.look()
            time.sleep(0.1)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the measurement failed with exit code {process.returncode}")
    return json.loads(printed), memory


def measure(kind: str, gigabytes: float, scratch: Path | None) -> str:
    """Returns the table's row for a format."""
    rows = int(gigabytes * GIGABYTE) // (4 * FEATURES) + 1
    room = shutil.disk_usage(scratch or tempfile.gettempdir()).free
    if room < 1.2 * gigabytes * GIGABYTE:
        raise SystemExit(f"{room / GIGABYTE:.1f} GB free for a set of {gigabytes} GB: give --scratch on a larger disk")
    with tempfile.TemporaryDirectory(prefix="batchnorm-streamed-", dir=scratch) as name:
        size = generate(Path(name), kind, rows)
        took, memory = in_a_process("epoch", Path(name))
        rates, _ = in_a_process("rates", Path(name))
    print(json.dumps({"kind": kind, "bytes": size, **took, **rates, **vars(memory)}), flush=True)
    return (
        f"| {kind} | {size / GIGABYTE:.2f} GB, {took['samples']:,} | {memory.pss:,} | {memory.rss:,} | "
        f"{memory.highest:,} | {took['survey_rate']:,.0f} | {took['train_rate']:,.0f} | {rates['ratio']:.2f} | "
        f"{took['accuracy']['none']:.1%}, {took['accuracy']['batch']:.1%} | {took['order']['variance_ratio']:.2f} |"
    )


def main() -> None:
    """Measures and writes the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the samples (default 8)")
    parser.add_argument("--formats", default="parquet,npy", help="of " + ", ".join(WRITERS))
    parser.add_argument("--scratch", type=Path, help="folder for the set (default: the system's)")
    parser.add_argument("--measure", choices=("epoch", "rates"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measured = {"epoch": train_epoch, "rates": compare_rates}[arguments.measure](arguments.scratch)
        print(json.dumps(measured))
        return
    table = [measure(kind, arguments.gigabytes, arguments.scratch) for kind in arguments.formats.split(",")]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    PAGE.write_text(before + "\n".join([MARKS[0], *_lines(table), MARKS[1]]) + after, encoding="utf-8")


def _lines(table: list[str]) -> list[str]:
    return [
        "| format | size, samples | PSS, all | RSS, all | VmHWM, largest | first pass | training | against memory "
        "| accuracy | order |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *table,
        "",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, commit {library_commit() or 'unknown'}. "
        "Made by `python benchmarks/streamed_memory.py`.",
    ]


if __name__ == "__main__":
    main()
