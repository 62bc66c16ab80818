"""The study behind docs/performance.md: `python benchmarks/performance.py` (some eleven minutes on two idle cores).

ResNet-50's and MobileNetV2's batch normalizations, forward and backward, against torch eager and a copy of the tensor:
medians of interleaved runs in one process, values checked against float64 first. Once with the default malloc, once
with jemalloc (LD_PRELOAD, where it is installed) on both sides. Whether the default malloc maps torch's outputs anew
depends on what a process did before; so each is done in a few processes, which take the problems up at different
places, and a row is their geometric mean. Peak memory is a process's own, one a contender.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchnorm import BatchNorm1d, bench
from batchnorm.bench import layer_bench

# (C, H, W) of every different batch normalization of the two networks, at 224 × 224
RESNET50 = (
    "64x112x112 64x56x56 256x56x56 128x56x56 128x28x28 512x28x28 256x28x28 256x14x14 1024x14x14 512x14x14 "
    "512x7x7 2048x7x7"
)
MOBILENETV2 = (
    "32x112x112 96x112x112 96x56x56 144x56x56 24x56x56 192x28x28 32x28x28 384x14x14 576x14x14 960x7x7 1280x7x7"
)
BATCH = 32
DOCS = Path(__file__).parent.parent / "docs" / "performance.md"
LARGE = 25e6  # bytes: above the caches, where the traffic bound holds


def problems() -> list[tuple[str, bench.Problem]]:
    """What is timed: the network's name and the problem."""
    plan = [("ResNet-50", RESNET50, "float32", case) for case in bench.CASES]
    plan += [("ResNet-50", RESNET50, "bfloat16", "bn+relu"), ("MobileNetV2", MOBILENETV2, "float32", "bn+relu")]
    return [
        (network, bench.Problem((BATCH, *map(int, word.split("x"))), dtype, layout, case))
        for network, words, dtype, case in plan
        for word in words.split()
        for layout in bench.LAYOUTS
    ]


def steps_of(problem: bench.Problem) -> dict[str, Callable[[], object]]:
    """Forward and backward of each contender."""
    return layer_bench.contenders(problem, layer_bench.calls_of(problem, "cpu"), "cpu", backward=True)


def time_one(problem: bench.Problem, seconds: float) -> dict[str, Any]:
    error = bench.check_values(problem, "cpu")
    times = bench.interleaved(steps_of(problem), seconds, least=5)
    spent = {name: vars(timing) for name, timing in times.items()}
    return {**vars(problem), "error": error, "seconds": spent}


def small_call(shape: tuple[int, int], seconds: float) -> dict[str, Any]:
    """A module call, forward and backward, where all of it is overhead: plain batch normalization."""
    x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def step(layer: nn.Module) -> Any:
        def run() -> None:
            layer(x).backward(g)
            x.grad = None

        return run

    contenders = {"ours": step(BatchNorm1d(shape[1])), "torch": step(nn.BatchNorm1d(shape[1]))}
    times = bench.interleaved(contenders, seconds, least=500)
    return {"shape": shape, "seconds": {name: vars(timing) for name, timing in times.items()}}


def peak_memory(contender: str) -> float:
    """MiB that a BN+ReLU forward and backward of (32, 256, 56, 56) adds to the process at its highest."""
    problem = bench.Problem((BATCH, 256, 56, 56), "float32", "contiguous", "bn+relu")
    run = steps_of(problem)[contender]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure(seconds: float, start: float) -> dict[str, Any]:
    """Every row in this process, beginning at this share of the list and going round."""
    plan = problems()
    rows: list[dict[str, Any]] = [{}] * len(plan)
    for i in range(len(plan)):
        at = (i + int(start * len(plan))) % len(plan)
        network, problem = plan[at]
        rows[at] = {"network": network, **time_one(problem, seconds)}
        print(problem.label, round(ratio(rows[at]), 2), file=sys.stderr, flush=True)
    small = [small_call(shape, 4 * seconds) for shape in ((256, 1024), (60, 100))]
    problem = bench.Problem((BATCH, 256, 56, 56), "float32", "contiguous", "bn+relu")
    return {
        "machine": bench.machine(),
        "rows": rows,
        "small": small,
        "evaluation": bench.evaluation(problem, seconds=4 * seconds),
    }


def pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over processes, percentile by percentile; so a ratio of medians is the mean of the ratios."""
    kinds = {}
    for kind in ("rows", "small"):
        kinds[kind] = [
            {
                **same[0],
                "seconds": {
                    name: {p: bench.geometric_mean(row["seconds"][name][p] for row in same) for p in percentiles}
                    for name, percentiles in same[0]["seconds"].items()
                },
            }
            for same in zip(*(run[kind] for run in runs), strict=True)
        ]
    evaluation = {key: bench.geometric_mean(run["evaluation"][key] for run in runs) for key in runs[0]["evaluation"]}
    return {"machine": runs[0]["machine"], **kinds, "evaluation": evaluation, "runs": runs}


def in_processes(count: int, seconds: float, preload: str | None = None) -> dict[str, Any]:
    arguments = [("--seconds", str(seconds / count), "--start", str(i / count)) for i in range(count)]
    return pooled([child("--child", "measure", *words, preload=preload) for words in arguments])


def ratio(row: dict[str, Any], over: str = "torch", under: str = "ours") -> float:
    return row["seconds"][over]["p50"] / row["seconds"][under]["p50"]


def child(*arguments: str, preload: str | None = None) -> Any:
    """What this script prints as JSON when run by itself in a process of its own."""
    environment = os.environ | ({"LD_PRELOAD": preload} if preload else {})
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout)


def size(row: dict[str, Any]) -> int:
    return int(torch.Size(row["shape"]).numel() * torch.empty(0, dtype=layer_bench.DTYPES[row["dtype"]]).itemsize)


def pick(result: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if all(row[k] == v for k, v in wanted.items())]


def mean(values: list[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f}"


def summary(results: dict[str, dict[str, Any]]) -> list[str]:
    """Geometric means, a line a kind of work."""
    lines = [
        "| work (geometric mean) | allocator | contiguous | channels_last | both (processes' range) "
        "| against in-place torch |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    kinds = [("ResNet-50", "float32", case) for case in bench.CASES]
    kinds += [("ResNet-50", "bfloat16", "bn+relu"), ("MobileNetV2", "float32", "bn+relu")]
    for network, dtype, case in kinds:
        for allocator, result in results.items():
            rows = pick(result, network=network, dtype=dtype, case=case)
            by_layout = [mean([ratio(r) for r in rows if r["layout"] == name]) for name in bench.LAYOUTS]
            in_place = mean([ratio(r, "torch_in_place") for r in rows]) if case != "bn" else "–"
            each = [
                bench.geometric_mean(ratio(r) for r in pick(run, network=network, dtype=dtype, case=case))
                for run in result["runs"]
            ]
            both = f"{mean([ratio(r) for r in rows])} ({min(each):.2f} to {max(each):.2f})"
            cells = [f"{network} {case} {dtype}", allocator, *by_layout, both, in_place]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"In copies of the tensor, tensors of {LARGE / 1e6:.0f} MB and more, forward and backward:", ""]
    lines += [
        "| work | allocator | least traffic | ours, contiguous | ours, channels_last | torch |",
        "|---|---|---|---|---|---|",
    ]
    for case in bench.CASES:
        for allocator, result in results.items():
            rows = [r for r in pick(result, network="ResNet-50", dtype="float32", case=case) if size(r) >= LARGE]
            ours = [mean([ratio(r, "ours", "copy") for r in rows if r["layout"] == name]) for name in bench.LAYOUTS]
            theirs = mean([ratio(r, "torch", "copy") for r in rows])
            cells = [case, allocator, f"{layer_bench.LEAST_COPIES[case]:.1f}", *ours, theirs]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def every_row(results: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| network | shape | dtype | layout | case | allocator | times torch | copies | ours p20/p50/p80 ms "
        "| torch p50 ms |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for allocator, result in results.items():
        for row in result["rows"]:
            ours, theirs = row["seconds"]["ours"], row["seconds"]["torch"]
            spread = "/".join(f"{ours[p] * 1e3:.2f}" for p in ("p20", "p50", "p80"))
            cells = [
                row["network"], "×".join(map(str, row["shape"])), row["dtype"], row["layout"], row["case"], allocator,
                f"{ratio(row):.2f}", f"{ratio(row, 'ours', 'copy'):.1f}", spread, f"{theirs['p50'] * 1e3:.2f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(results: dict[str, dict[str, Any]], memory: dict[str, float], notes: str) -> str:
    facts = next(iter(results.values()))["machine"]
    small = [
        f"| {row['shape'][0]} × {row['shape'][1]} | {allocator} | {ratio(row):.2f} | "
        f"{row['seconds']['ours']['p50'] * 1e6:.0f} | {row['seconds']['torch']['p50'] * 1e6:.0f} |"
        for allocator, result in results.items()
        for row in result["small"]
    ]
    evaluated = [
        f"- {allocator}: {result['evaluation']['speedup']:.2f} × torch, {result['evaluation']['copies']:.2f} copies"
        for allocator, result in results.items()
    ]
    return "\n".join(
        [
            "# Performance", "",
            "Written by `python benchmarks/performance.py`; `batchnorm bench` gives the same kind of figures for your "
            "machine.", "",
            f"{facts['processor']}, {facts['threads']} threads, torch {facts['torch']}, Python {facts['python']}, "
            f"batch {BATCH}, forward and backward. Medians of interleaved runs, geometric means over "
            f"{len(next(iter(results.values()))['runs'])} processes; *times torch* is torch eager's median over ours, "
            "so more is better. *In-place torch* adds and rectifies in place, like torchvision.", "",
            *summary(results), "", "## Small tensors", "",
            "| module call, forward and backward | allocator | times torch | ours µs | torch µs |",
            "|---|---|---|---|---|",
            *small, "", "## Evaluation", "", "BN+ReLU of 32×256×56×56, float32, one pass:", "", *evaluated, "",
            "## Peak memory", "",
            "BN+ReLU forward and backward of 32×256×56×56 float32 (98 MiB a tensor), MiB added:", "",
            "| ours | torch | torch, in place |", "|---|---|---|",
            f"| {memory['ours']:.0f} | {memory['torch']:.0f} | {memory['torch_in_place']:.0f} |", "",
            notes, "", "## Every row", "", *every_row(results), "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=("measure", "peak"), help=argparse.SUPPRESS)
    parser.add_argument("--contender", default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.9, help="measuring time a row, over all processes")
    parser.add_argument("--processes", type=int, choices=range(1, 17), default=3, help="how many an allocator")
    options = parser.parse_args()
    if options.child == "peak":
        print(json.dumps(peak_memory(options.contender)))
        return
    if options.child == "measure":
        print(json.dumps(measure(options.seconds, options.start)))
        return
    results = {"default malloc": in_processes(options.processes, options.seconds)}
    jemalloc = ctypes.util.find_library("jemalloc")
    if jemalloc:
        results["jemalloc"] = in_processes(options.processes, options.seconds, preload=jemalloc)
    memory = {name: child("--child", "peak", "--contender", name) for name in ("ours", "torch", "torch_in_place")}
    notes = Path(__file__).with_name("performance_notes.md")
    DOCS.write_text(page(results, memory, notes.read_text() if notes.exists() else ""))
    print("\n".join(summary(results)))


if __name__ == "__main__":
    main()
