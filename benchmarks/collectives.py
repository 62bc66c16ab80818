"""What synchronized statistics cost from 2 to 1,024 ranks: measured with gloo, extrapolated; writes into docs/scale.md.

    python -m benchmarks.collectives            # two nodes of this machine
    torchrun ... -m benchmarks.collectives      # on a cluster of yours: the first rank prints instead

Measured: one all-gather and one all-reduce, as the layers call them, over sizes, on two ranks; a straight line through
them gives latency α and bandwidth B. Extrapolated from these: the α-β model of ring and tree collectives.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.marked import made_by, write_part
from examples.distributed.two_nodes import kill, nodes, start

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
RANKS = tuple(2**k for k in range(1, 11))
DOUBLES = (16, 128, 512, 2048, 8192, 32768, 131072)  # 128 B to 1 MiB
REPEATS = 60
# ResNet-50's 53 layers: (blocks, width) of each stage; a block has two layers of that width and one of four times it,
# and the first of a stage one more on its shortcut.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
PARAMETERS = 25_557_032
Times = dict[str, dict[int, float]]


def channels() -> list[int]:
    """Returns the channels of every batch normalization of ResNet-50."""
    layers = [64]
    for blocks, width in STAGES:
        layers += blocks * [width, width, 4 * width] + [4 * width]
    return layers


def collective(name: str, x: torch.Tensor) -> torch.Tensor:
    """Runs the operator of moments/synchronized.py."""
    group = dist.group.WORLD.group_name
    if name == "all_gather":
        out = torch.ops._c10d_functional.all_gather_into_tensor(x, dist.get_world_size(), group)
    else:
        out = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    return torch.ops._c10d_functional.wait_tensor(out)


def measure() -> Times:
    """Returns median seconds by operator and by bytes a rank; sizes in turn, so that a disturbance meets them alike."""
    torch.set_num_threads(1)
    taken: dict[tuple[str, int], list[float]] = {
        (name, n): [] for name in ("all_gather", "all_reduce") for n in DOUBLES
    }
    for _ in range(REPEATS):
        for (name, n), times in taken.items():
            x = torch.ones(n, dtype=torch.float64)
            dist.barrier()
            started = time.perf_counter()
            collective(name, x)
            times.append(time.perf_counter() - started)
    result: Times = {"all_gather": {}, "all_reduce": {}}
    for (name, n), times in taken.items():
        result[name][8 * n] = statistics.median(times[5:])
    return result


def fit(times: dict[int, float]) -> tuple[float, float]:
    """Returns (seconds at size zero, seconds a byte) of the line with the least relative squared error."""
    sizes, seconds = np.array(list(times)), np.array(list(times.values()))
    design = np.stack([np.ones_like(sizes), sizes], 1) / seconds[:, None]
    (start_up, per_byte), *_ = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)
    return float(start_up), float(per_byte)


class Model:
    """The α-β model: a message of n bytes takes α + n/B. At two ranks a ring all-reduce is two messages of half."""

    def __init__(self, times: Times) -> None:
        gather, reduce = fit(times["all_gather"]), fit(times["all_reduce"])
        self.gather_alpha, self.gather_beta = gather
        self.reduce_alpha, self.reduce_beta = reduce[0] / 2, reduce[1]

    def all_gather(self, p: int, m: float, shape: str) -> float:
        """Returns the seconds until each of p ranks has the m bytes of all the others."""
        messages = p - 1 if shape == "ring" else math.log2(p)
        return messages * self.gather_alpha + (p - 1) * m * self.gather_beta

    def all_reduce(self, p: int, n: float, shape: str) -> float:
        """Returns the seconds until each of p ranks has the sum of n bytes."""
        if shape == "ring":
            return 2 * (p - 1) * (self.reduce_alpha + n / p * self.reduce_beta)
        return math.log2(p) * (self.reduce_alpha + n * self.reduce_beta)

    def step(self, p: int, shape: str) -> float:
        """Returns the seconds of all the statistics of a ResNet-50's training step: they cannot overlap."""
        return sum(self.all_gather(p, 8 * (2 * c + 1), shape) + self.all_reduce(p, 16 * c, shape) for c in channels())


def table(model: Model) -> str:
    """Returns the extrapolated table in Markdown."""
    lines = ["| ranks | ring, ms | tree, ms | received a rank, MB | gradients (ring), ms |", "|---|---|---|---|---|"]
    for p in RANKS:
        received = sum((p - 1) * 8 * (2 * c + 1) for c in channels()) / 1e6
        gradients = 1000 * model.all_reduce(p, 4 * PARAMETERS, "ring")
        ring, tree = (1000 * model.step(p, shape) for shape in ("ring", "tree"))
        lines.append(f"| {p:,} | {ring:,.0f} | {tree:,.0f} | {received:,.1f} | {gradients:,.0f} |")
    return "\n".join(lines)


def page(two: Times, four: Times, what: str) -> str:
    """Returns the part of docs/scale.md."""
    model = Model(two)
    measured = ["| bytes a rank | all-gather, µs | all-reduce, µs |", "|---|---|---|"]
    measured += [
        f"| {n:,} | {1e6 * two['all_gather'][n]:,.0f} | {1e6 * two['all_reduce'][n]:,.0f} |" for n in two["all_gather"]
    ]
    off = [four[name][n] / getattr(model, name)(4, n, "ring") for name in four for n in four[name]]
    gather = f"α = {1e6 * model.gather_alpha:,.0f} µs, B = {1e-9 / model.gather_beta:.2f} GB/s"
    reduce = f"α = {1e6 * model.reduce_alpha:,.0f} µs a message, B = {1e-9 / model.reduce_beta:.2f} GB/s"
    return f"""**Measured**: two ranks, {what}, medians of {REPEATS - 5} calls.

{chr(10).join(measured)}

The lines through them: all-gather {gather}; all-reduce {reduce}.
Where the model can be checked, on four ranks, two a node (so four processes on {os.cpu_count()} cores), the measured
times were {min(off):.1f} to {max(off):.1f} times the ring's prediction, median {statistics.median(off):.1f}.

**Extrapolated** from these α and B by the model, not measured: all the statistics of one training step of a ResNet-50
(53 layers, forward and backward), which nothing overlaps; beside them the gradients, which overlap with the backward.

{table(model)}"""


def worker() -> None:
    """One rank: measures, and the first prints."""
    dist.init_process_group("gloo")
    times = measure()
    if dist.get_rank() == 0:
        print(json.dumps({name: {str(n): t for n, t in row.items()} for name, row in times.items()}))
        if dist.get_world_size() == 2:
            print(table(Model(times)), file=sys.stderr)
    dist.destroy_process_group()


def on_two_nodes(processes: int) -> tuple[Times, str]:
    """Returns what so many processes on each of two nodes measure, and what the nodes are."""
    with nodes() as (what, prefixes, where):
        agents = start(prefixes, where, ["-m", "benchmarks.collectives"], processes)
        try:
            printed, _ = (agent.communicate(timeout=500)[0] for agent in agents)
        finally:
            for agent in agents:
                if agent.poll() is None:
                    kill(agent)
    line = next(line for line in printed.splitlines() if line.startswith("{"))
    return {name: {int(n): t for n, t in row.items()} for name, row in json.loads(line).items()}, what


def main() -> None:
    """Measures on two and on four ranks and writes the part."""
    if "RANK" in os.environ:
        worker()
        return
    (two, what), (four, _) = on_two_nodes(1), on_two_nodes(2)
    text = page(two, four, what)
    print(text)
    write_part(PAGE, "alpha", f"{text}\n\n{made_by('python -m benchmarks.collectives', os.cpu_count() or 1)}")


if __name__ == "__main__":
    main()
