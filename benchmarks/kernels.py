"""The operators against torch eager and a copy of the tensor: ResNet-50's shapes, interleaved, values checked first.

    python benchmarks/kernels.py --layout both --dtype float32 --kinds plain,relu,add_relu --csv kernels.csv

Ratios of medians over runs that alternate in one process. `--cpu-time` with `--threads 1` is for a shared machine:
wall time would measure its other users. For jemalloc, preload it: LD_PRELOAD=libjemalloc.so.2.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.ops import BatchStatistics, extension

SHAPES = [
    (32, 64, 112, 112), (32, 64, 56, 56), (32, 256, 56, 56), (32, 128, 28, 28), (32, 512, 28, 28),
    (32, 256, 14, 14), (32, 1024, 14, 14), (32, 512, 7, 7), (32, 2048, 7, 7),
]  # fmt: skip
EPS = 1e-5


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=["contiguous", "channels_last", "both"], default="both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32")
    parser.add_argument("--kinds", default="plain,relu,add_relu")
    parser.add_argument("--shapes", default="", help="indices into the list of shapes, comma-separated")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--csv", default="")
    return parser.parse_args()


def problem(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, residual, grad = (torch.randn(shape).to(dtype).contiguous(memory_format=order) for _ in range(3))
    weight, bias = torch.rand(shape[1]), torch.randn(shape[1])
    for leaf in (x, residual, weight, bias):
        leaf.requires_grad_()
    return {"x": x, "residual": residual, "grad": grad, "weight": weight, "bias": bias}


def theirs(p: dict[str, Tensor], kind: str) -> Tensor:
    z = F.batch_norm(p["x"], None, None, p["weight"], p["bias"], True, 0.1, EPS)
    if kind == "add_relu":
        return F.relu(z + p["residual"], inplace=True)
    return F.relu(z) if kind == "relu" else z


def ours(p: dict[str, Tensor], kind: str) -> Tensor:
    residual = p["residual"] if kind == "add_relu" else None
    activation = "" if kind == "plain" else "relu"
    return BatchStatistics.apply(p["x"], p["weight"], p["bias"], residual, None, EPS, activation, 0.0, 0)[0]


def step(layer: Callable[[dict[str, Tensor], str], Tensor], p: dict[str, Tensor], kind: str) -> None:
    layer(p, kind).backward(p["grad"])
    for leaf in p.values():
        leaf.grad = None


def check(p: dict[str, Tensor], kind: str) -> None:
    """Nothing is timed whose output or gradient is not torch's (the gradient but for values at a ReLU's kink)."""
    found = []
    for layer in (ours, theirs):
        out = layer(p, kind)
        out.backward(p["grad"])
        found.append((out.detach().float(), p["x"].grad.float()))
        for leaf in p.values():
            leaf.grad = None
    tolerance = 1e-3 if p["x"].dtype in (torch.float32, torch.float64) else 6e-2
    torch.testing.assert_close(found[0][0], found[1][0], rtol=tolerance, atol=tolerance)
    off = (found[0][1] - found[1][1]).abs() > tolerance * (1 + found[1][1].abs())
    assert off.float().mean() < 1e-3, "gradients differ"


def measure(p: dict[str, Tensor], kind: str, runs: int, clock: Callable[[], float]) -> dict[str, float]:
    target, source = torch.empty_like(p["x"].detach()), p["x"].detach()
    work = {
        "torch": lambda: step(theirs, p, kind),
        "ours": lambda: step(ours, p, kind),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(runs + 2):
        for name, run in work.items():
            start = clock()
            run()
            if repeat >= 2:
                times[name].append(clock() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ratio": median["torch"] / median["ours"],
        "copies": median["ours"] / median["copy"],
        "torch_copies": median["torch"] / median["copy"],
        "copy_ms": median["copy"] * 1e3,
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    shapes = [SHAPES[int(i)] for i in args.shapes.split(",")] if args.shapes else SHAPES
    layouts = ["contiguous", "channels_last"] if args.layout == "both" else [args.layout]
    allocator = "jemalloc" if "jemalloc" in os.environ.get("LD_PRELOAD", "") else "default malloc"
    kernels = "loaded" if extension.LOADED else "MISSING"
    print(f"torch {torch.__version__}, {args.threads} threads, {allocator}, kernels {kernels}")
    rows = []
    for layout in layouts:
        for kind in args.kinds.split(","):
            ratios, copies = [], []
            for shape in shapes:
                p = problem(shape, layout, getattr(torch, args.dtype))
                check(p, kind)
                found = measure(p, kind, args.runs, clock)
                rows.append(
                    {"layout": layout, "kind": kind, "dtype": args.dtype, "shape": "x".join(map(str, shape)), **found}
                )
                ratios.append(math.log(found["ratio"]))
                copies.append(math.log(found["copies"]))
                print(f"{layout:13} {kind:8} {shape!s:20} {found['ratio']:5.2f} x torch {found['copies']:6.2f} copies"
                      f" (torch {found['torch_copies']:6.2f}; copy {found['copy_ms']:.2f} ms)", flush=True)  # fmt: skip
            mean = [math.exp(statistics.fmean(values)) for values in (ratios, copies)]
            print(f"{layout:13} {kind:8} geometric mean       {mean[0]:5.2f} x torch {mean[1]:6.2f} copies")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
