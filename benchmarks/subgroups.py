"""How many samples must share their statistics? Accuracy by the size of the group; writes its part of docs/scale.md.

    python -m benchmarks.subgroups [--seeds 5]

A joined batch of 256 whose statistics are those of slices of so many samples (`ghost_batch_size`) is, sample for
sample, what ranks synchronized in groups of so many samples compute: one process shows what it does to the accuracy.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from batchnorm import BatchNormAct1d, BatchNormAct2d
from benchmarks.marked import made_by, write_part

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
BATCH, STEPS, TRAIN = 256, 120, 1280
SIZES = (2, 4, 8, 16, 32, 64, 256)


def convolutional(size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), BatchNormAct2d(16, "relu", ghost_batch_size=size),
        nn.Conv2d(16, 32, 3, stride=2, bias=False), BatchNormAct2d(32, "relu", ghost_batch_size=size),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def dense(size: int) -> nn.Module:
    def hidden(features: int) -> list[nn.Module]:
        norm = BatchNormAct1d(100, "relu", ghost_batch_size=size)
        return [nn.Linear(features, 100, bias=False), norm]

    return nn.Sequential(nn.Flatten(), *hidden(64), *hidden(100), nn.Linear(100, 10))


def accuracy(build: object, size: int, seed: int) -> float:
    """Returns the percentage of test samples right after the training."""
    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)[order]
    y = torch.tensor(digits.target)[order]
    net: nn.Module = build(size)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        index = torch.randint(TRAIN, (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        return 100 * float((net(x[TRAIN:]).argmax(1) == y[TRAIN:]).float().mean())


def main() -> None:
    """Trains every size under every seed and writes the part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| samples sharing | dense | convolutional |", "|---|---|---|"]
    for size in SIZES:
        cells = []
        for build in (dense, convolutional):
            found = [accuracy(build, size, seed) for seed in range(given.seeds)]
            cells.append(f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}")
        lines.append(f"| {size} | {cells[0]} | {cells[1]} |")
        print(lines[-1], flush=True)
    text = (
        f"Test accuracy in percent, mean ± standard deviation of {given.seeds} seeds: scikit-learn's digits, {STEPS} "
    )
    text += f"steps with a joined batch of {BATCH}; the convolutional network's first layer has 36 values a sample.\n\n"
    text += "\n".join(lines)
    command = f"python -m benchmarks.subgroups --seeds {given.seeds}"
    write_part(PAGE, "subgroups", f"{text}\n\n{made_by(command, os.cpu_count() or 1)}")


if __name__ == "__main__":
    main()
