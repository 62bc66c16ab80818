"""What `inplace=True` saves: `python benchmarks/in_place.py` (two minutes; its table stands in docs/in-place.md).

One training step of a chain of convolution, batch normalization and leaky ReLU, each contender in three processes
of its own: what the step adds to the process's memory at its highest, and the median time of a step; medians of the
three, since the allocator's habits differ from process to process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from statistics import median

import torch
from torch import nn

from batchnorm import convert

BLOCKS, CHANNELS, BATCH, SIZE = 10, 64, 32, 56
CONTENDERS = ("torch", "torch, activation in place", "ours", "ours, inplace=True")


def network(contender: str) -> nn.Module:
    def block() -> list[nn.Module]:
        activation = nn.LeakyReLU(0.01, inplace="activation" in contender)
        return [nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS), activation]

    model = nn.Sequential(*[layer for _ in range(BLOCKS) for layer in block()])
    return convert(model, inplace="inplace" in contender) if "ours" in contender else model


def measure(contender: str) -> dict[str, float]:
    torch.manual_seed(0)
    model, x = network(contender), torch.randn(BATCH, CHANNELS, SIZE, SIZE)

    def step() -> None:
        model(x).mean().backward()
        model.zero_grad()

    small = x[:2, :, :4, :4].contiguous()
    model(small).mean().backward()  # what torch and the convolutions set up once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    times = []
    for _ in range(9):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"peak": peak, "seconds": median(times)}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    tensor = BATCH * CHANNELS * SIZE * SIZE * 4 / 2**20
    print(f"{BLOCKS} blocks at {BATCH} x {CHANNELS} x {SIZE} x {SIZE} float32, {tensor:.0f} MiB a tensor\n")
    print("| network | peak MiB | tensors | ms a step |\n|---|---|---|---|")
    for contender in CONTENDERS:
        command = [sys.executable, __file__, contender]
        runs = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)]
        peak, seconds = (median(run[key] for run in runs) for key in ("peak", "seconds"))
        print(f"| {contender} | {peak:.0f} | {peak / tensor:.1f} | {seconds * 1e3:.0f} |")


if __name__ == "__main__":
    main()
