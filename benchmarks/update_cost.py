"""What one update costs as the data grow, with all data and with a mini-batch; writes into docs/sgd.md.

    python benchmarks/update_cost.py [--repeats 15]

The study's `mlp` on digits, whose training part is repeated 4, 16 and 64 times: an update's cost depends on how many
samples there are and not on which. All sizes, arms and batches are timed in turn on one thread, a block of updates
each, so that a busy moment falls on all alike; the ratios are medians of the ratios within a round.
Needs Chromium for the picture.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat

import numpy as np
import torch
from sgd_page import PAGE, cost_picture, write_block

from batchnorm.experiment.data.dataset import Dataset
from batchnorm.experiment.data.opening import load
from batchnorm.experiment.output.provenance import library_commit
from batchnorm.experiment.training.networks import Architecture
from batchnorm.experiment.training.optimizers import make_optimizer
from batchnorm.experiment.training.train import update

FACTORS = (1, 4, 16, 64)
ARMS = ("none", "batch")
BATCHES = ("full", "mini")
MINI = 60
Key = tuple[str, str, int]


def one_update(arm: str, batch: str, data: Dataset) -> Callable[[], None]:
    """Returns a function that draws a batch and takes one update."""
    size = data.size("train") if batch == "full" else MINI
    model = Architecture("mlp", data.shape, 10, size).build(arm, 0).train()
    optimizer = make_optimizer("sgd", model.parameters(), 0.1, 0.0)
    # All data are one batch in any order: the full batch need not be drawn.
    whole = torch.from_numpy(data.x["train"]), torch.from_numpy(data.y["train"])
    batches = repeat(whole) if batch == "full" else data.batches(size, 0)

    def take() -> None:
        update(model, optimizer, *next(batches))

    return take


def measure(repeats: int) -> tuple[dict[Key, list[float]], int]:
    """Returns the seconds of an update in every round by (arm, batch, factor), and the samples at factor 1."""
    data = load("digits")
    grown = {}
    for factor in FACTORS:
        x, y = ({"train": np.concatenate([part["train"]] * factor)} for part in (data.x, data.y))
        grown[factor] = replace(data, x=x, y=y)
    takers = {(arm, batch, f): one_update(arm, batch, grown[f]) for f in FACTORS for arm in ARMS for batch in BATCHES}
    times: dict[Key, list[float]] = {key: [] for key in takers}
    # A block of the same samples on every size would take long on the largest: as many updates as last a while.
    blocks = {key: 1 if key[1] == "full" and key[2] > 4 else 10 for key in takers}
    for round_ in range(repeats + 1):
        for key, take in takers.items():
            started = time.perf_counter()
            for _ in range(blocks[key]):
                take()
            if round_ > 0:  # the first round warms caches and allocator up
                times[key].append((time.perf_counter() - started) / blocks[key])
    return times, data.size("train")


def ratio(above: list[float], below: list[float]) -> float:
    """Returns the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    """Measures and writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="blocks a cell (default 15)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    costs, samples = measure(repeats)
    ratios = {key: ratio(taken, costs[key[0], key[1], 1]) for key, taken in costs.items()}
    across = {(arm, f): ratio(costs[arm, "full", f], costs[arm, "mini", f]) for arm in ARMS for f in FACTORS}
    lines = [
        f"| {f} × | {f * samples:,} | "
        + " | ".join(
            f"{ratios[arm, 'full', f]:.3g} | {ratios[arm, 'mini', f]:.2f} | {across[arm, f]:.3g}" for arm in ARMS
        )
        + " |"
        for f in FACTORS
    ]
    heads = " | ".join(f"`{arm}`: full | mini-batch | full / mini" for arm in ARMS)
    table = "\n".join([f"| data | samples | {heads} |", "|---" * (2 + 3 * len(ARMS)) + "|", *lines])
    mini = ", ".join(f"{1000 * statistics.median(costs[arm, 'mini', 1]):.2f} ms (`{arm}`)" for arm in ARMS)
    write_block(
        "update-cost",
        f"{table}\n\nOne update against one at 1 ×, and all data against a mini-batch of {MINI}, whose update took "
        f"{mini} at 1 × here. {platform.system()} {platform.machine()}, one thread of {os.cpu_count()} cores, "
        f"torch {torch.__version__}, medians over {repeats} rounds, commit {library_commit() or 'unknown'}.",
    )
    cost_picture(ratios, FACTORS, ARMS, PAGE.parent / "images" / "update-cost.png")
    print(PAGE)


if __name__ == "__main__":
    main()
