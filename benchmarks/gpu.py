"""The layers on one GPU, against torch eager, torch without cuDNN, torch.compile and a copy; ResNet-50's training step.

    python benchmarks/gpu.py [--seconds 0.5] [--parts layers,passes,host,model] [--batch 256]

Writes the tables of docs/performance-gpu.md. Values are compared with float64 before anything is timed. Times are
medians of interleaved calls by the device's own events, the L2 cache emptied before each and the host ahead of the
device; the unit is the device-to-device copy of the same tensor, one read and one write. Exits 2 with one line where
there is no CUDA.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import bench

PAGE = Path(__file__).parents[1] / "docs" / "performance-gpu.md"
START, END = "<!-- {}: written by benchmarks/gpu.py -->", "<!-- end of {} -->"
STAGES = ("64x112x112", "256x56x56", "512x28x28", "1024x14x14", "2048x7x7")
# Reads and writes of the tensor that each pass makes, in copies (one read, one write).
TRAFFIC = {"stats": 0.5, "apply": 1.5, "backward_reduce": 2.0, "backward_elemt": 1.5}

Call = Callable[[], object]


def layers(batch: int, seconds: float) -> Iterator[list[str]]:
    """ResNet-50's stages: forward + backward in copies, and torch's time over ours."""
    head = "| tensor | case | copy µs | ours | eager | native | compiled | × eager | × native | × compiled | of bound |"
    lines = [head, "|---" * 11 + "|"]
    shapes = ",".join(f"{batch}x{stage}" for stage in STAGES)
    for dtypes, layouts, cases in (
        ("bfloat16", "channels_last", "bn+add+relu"),
        ("bfloat16", "channels_last", "bn+relu"),
        ("bfloat16", "contiguous", "bn+add+relu"),
        ("float32", "channels_last", "bn+add+relu"),
    ):
        result = bench.bench(shapes, dtypes, layouts, cases, "cuda", None, seconds)
        lines += [layer_row(row) for row in result["rows"]]
        print("\n".join(lines[-len(result["rows"]) :]), flush=True)
        yield lines


def layer_row(row: dict[str, Any]) -> str:
    both, times = row["both"], {name: t["p50"] for name, t in row["both"]["seconds"].items()}
    unit = times["copy"]
    cells = ["x".join(map(str, row["shape"])) + f" {row['dtype']} {row['layout']}", row["case"], f"{unit * 1e6:.0f}"]
    cells += [f"{times[name] / unit:.2f}" for name in ("ours", "torch", "native", "compiled")]
    cells += [f"**{both['speedup']:.2f}**", f"{both['speedup_native']:.2f}", f"**{both['speedup_compiled']:.2f}**"]
    return "| " + " | ".join([*cells, f"{100 * row['least_copies'] / both['copies']:.0f} %"]) + " |"


def passes(batch: int, seconds: float) -> Iterator[list[str]]:
    """The share of the copy's bandwidth that each primitive reaches on BN + add + ReLU in bfloat16."""
    lines = ["| tensor | " + " | ".join(TRAFFIC) + " |", "|---" * 5 + "|"]
    for layout in bench.LAYOUTS:
        for stage in STAGES:
            shape = (batch, *map(int, stage.split("x")))
            calls, unit = primitives(shape, layout)
            times = bench.interleaved({**calls, "copy": unit}, seconds, clock=bench.DeviceClock())
            shares = [f"{100 * TRAFFIC[name] * times['copy'].p50 / times[name].p50:.0f} %" for name in TRAFFIC]
            lines.append("| " + " | ".join([f"{batch}x{stage} {layout}", *shares]) + " |")
            print(lines[-1], flush=True)
        yield lines


def primitives(shape: tuple[int, ...], layout: str) -> tuple[dict[str, Call], Call]:
    """The four primitives as the fused operators call them, and the copy."""
    from batchnorm.ops.triton import launch
    from batchnorm.ops.triton.apply import activation_constants, launch_apply
    from batchnorm.ops.triton.backward_elemt import launch_backward_elemt
    from batchnorm.ops.triton.backward_reduce import launch_backward_reduce
    from batchnorm.ops.triton.coefficients import coefficients
    from batchnorm.ops.triton.stats import launch_stats

    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, r, g = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=memory) for _ in range(3)
    )
    weight, bias = torch.rand(shape[1], device="cuda"), torch.randn(shape[1], device="cuda")
    mean, var, count, _ = launch_stats(x, None, launch.make_plan(x, 0, launch.STATS))
    vectors: list[Tensor | None] = [mean, var, weight, bias]
    coefs = coefficients(x, vectors, (mean, var), count, 1e-5)
    dx, dz, plan = torch.empty_like(x), torch.empty_like(x), launch.make_plan(x, 0, launch.REDUCE)
    relu, identity = activation_constants("relu", 0.0), activation_constants("", 0.0)
    return {
        "stats": lambda: launch_stats(x, None, launch.make_plan(x, 0, launch.STATS)),
        "apply": lambda: launch_apply(x, coefs, r, "relu", 0.0, 0),
        "backward_reduce": lambda: launch_backward_reduce(g, x, vectors, r, None, relu, plan, 1e-5, dz),
        "backward_elemt": lambda: launch_backward_elemt(g, x, coefs, None, None, True, (dx, None), identity, 0),
    }, lambda: dx.copy_(x)


def host() -> Iterator[list[str]]:
    """Microseconds that the host takes over one small layer's step, the device far behind or idle."""
    lines = ["| 60 × 100, BN + add + ReLU | ours | eager |", "|---" * 3 + "|"]
    x, r, g = (torch.randn(60, 100, device="cuda") for _ in range(3))
    x, r = x.requires_grad_(), r.requires_grad_()
    ours, theirs = batchnorm.BatchNormAct1d(100, "relu", device="cuda"), nn.BatchNorm1d(100, device="cuda")
    calls: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(x, r), "eager": lambda: torch.relu(theirs(x) + r)}
    forward = bench.interleaved(calls, 1.0)
    both = bench.interleaved({name: lambda f=f: torch.autograd.grad(f(), [x, r], g) for name, f in calls.items()}, 1.0)
    for name, times in (("forward", forward), ("forward and backward", both)):
        lines.append(f"| {name} | {times['ours'].p50 * 1e6:.0f} | {times['eager'].p50 * 1e6:.0f} |")
    yield lines


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "eager": lambda m: m,
    "ours, `convert`": batchnorm.convert,
    "ours, `fuse`": batchnorm.fuse,
    "compiled": torch.compile,
    "ours compiled, `fuse(rest='inductor')`": lambda m: batchnorm.fuse(m, rest="inductor"),
}


def model(batch: int, seconds: float) -> Iterator[list[str]]:
    """ResNet-50's whole training step in bfloat16 (autocast), channels_last, SGD.

    First what compiles in seconds, then all again: inductor takes minutes, and a run cut short has the rest.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    torch._dynamo.reset()
    torch.manual_seed(0)
    network = ResNetForImageClassification(ResNetConfig(num_labels=1000)).cuda().to(memory_format=torch.channels_last)
    example = {"pixel_values": torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)}
    steps: dict[str, Call] = {}
    for names in (list(WAYS)[:3], list(WAYS)[3:]):
        for name in names:
            steps[name] = bench.training_step(WAYS[name](copy.deepcopy(network).train()), example, "bfloat16")
            print(name, "first loss", steps[name](), flush=True)
        times = bench.interleaved(steps, seconds * 20)
        eager = times["eager"].p50
        rows = [f"| {name} | {t.p50 * 1e3:.1f} | {eager / t.p50:.2f} |" for name, t in times.items()]
        print("\n".join(rows), flush=True)
        yield ["| training step | ms | × eager |", "|---" * 3 + "|", *rows]


def versions() -> str:
    facts = bench.machine("cuda")
    commit = subprocess.run(
        ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    found = f"{facts['processor']}; torch {facts['torch']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}"
    return f"{found}, Triton {facts['triton']}" + (f"; commit {commit}." if commit else ".")


def put(page: str, name: str, lines: list[str]) -> str:
    """The page with one table replaced."""
    start, end = START.format(name), END.format(name)
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n" + "\n".join(lines) + f"\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time a row")
    parser.add_argument("--parts", default="layers,passes,host,model", help="which tables, comma-separated")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("batchnorm: no CUDA device, on this machine, run this where there is a GPU", file=sys.stderr)
        raise SystemExit(2)
    tables: dict[str, Callable[[], Iterator[list[str]]]] = {
        "layers": lambda: layers(options.batch, options.seconds),
        "passes": lambda: passes(options.batch, options.seconds),
        "host": host,
        "model": lambda: model(options.batch, options.seconds),
    }
    parts = options.parts.split(",")
    if not tables.keys() >= set(parts):
        print(f"batchnorm: no part {options.parts!r}, in --parts, choose from {','.join(tables)}", file=sys.stderr)
        raise SystemExit(2)
    for name in parts:
        for lines in tables[name]():  # the page as it is so far: a run cut short keeps what it has measured
            head = [f"{versions()} `python benchmarks/gpu.py --parts {name}`", ""]
            PAGE.write_text(put(PAGE.read_text(), name, head + lines))


if __name__ == "__main__":
    main()
