"""What `Monitor` costs a training step at its default sampling; writes docs/monitor-overhead.md.

    python benchmarks/monitor_overhead.py [--pairs 20]

Rounds of 50 steps, one sample each, with and without the monitor, run in turn; the ratio of neighbors is compared.
Processor time of one thread, which other processes on the machine hardly touch.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from batchnorm import Monitor

PAGE = Path(__file__).parents[1] / "docs" / "monitor-overhead.md"
STEPS = 50


def mlp() -> nn.Module:
    widths = [64, 256, 256, 256]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def cnn() -> nn.Module:
    widths = [3, 16, 32, 32]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


NETS = {"MLP, 3 layers of 256, batch 128": (mlp, (128, 64)), "CNN, 3 layers, 16×16, batch 32": (cnn, (32, 3, 16, 16))}


def seconds(model: nn.Module, x: torch.Tensor, y: torch.Tensor, watched: bool) -> float:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    started = time.process_time()
    with Monitor(model) if watched else contextlib.nullcontext():
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return time.process_time() - started


def measure(name: str, pairs: int) -> str:
    make, shape = NETS[name]
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(shape), torch.randint(10, (shape[0],))
    seconds(model, x, y, True)
    found = []
    for number in range(pairs):
        order = (False, True) if number % 2 else (True, False)
        times = {watched: seconds(model, x, y, watched) for watched in order}
        found.append((times[True] / times[False], times[False]))
    ratios = sorted(ratio for ratio, _ in found)
    low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
    step = statistics.median(plain for _, plain in found) / STEPS * 1e3
    return f"| {name} | {step:.2f} | {statistics.median(ratios):.3f} | {low:.3f} – {high:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    rows = [measure(name, pairs) for name in NETS]
    text = (
        "# What `Monitor` costs\n\n"
        f"Made by `python benchmarks/monitor_overhead.py --pairs {pairs}`: rounds of {STEPS} training steps with and "
        "without the monitor at its default sampling (every 50th forward), in turn; processor time of one thread.\n\n"
        "| network | step without, ms | with / without, median | 20 % – 80 % |\n|---|---|---|---|\n"
    )
    PAGE.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
