"""BN + add + ReLU, forward and backward, on one GPU: ours against torch eager, torch.compile and a copy.

    python benchmarks/gpu.py [--repetitions 200]

Writes the table of docs/performance-gpu.md. Values are compared with float64 before anything is timed. Times are
medians by device events (triton.testing.do_bench, which empties the L2 cache between calls); the unit is the
device-to-device copy of the same tensor, one read and one write. Exits 2 with one line where there is no CUDA.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._functorch import config as compiled_backward

import batchnorm

PAGE = Path(__file__).parents[1] / "docs" / "performance-gpu.md"
START, END = "<!-- table: written by benchmarks/gpu.py -->", "<!-- end of table -->"
SHAPES = [(256, 64, 112, 112), (256, 256, 56, 56), (256, 512, 28, 28), (256, 2048, 7, 7), (4096, 1024)]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Bytes over those of one copy (2 tensors): forward reads x twice and the residual, writes y; backward reads x, dy and
# the residual twice, writes dx and the residual's gradient. One read of each where a channel stays on the chip.
LEAST = {"forward": 4 / 2, "backward": 8 / 2}

Step = Callable[[], object]


class Block(nn.Module):
    """relu(bn(x) + residual) of any layer, as a user writes it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(self.layer(x) + residual)


class Fused(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.layer(x, residual)


def contenders(shape: tuple[int, ...], device: torch.device) -> dict[str, nn.Module]:
    """Modules by name. Eager uses cuDNN where torch chooses it; "native" forbids that while it runs."""
    kind = "BatchNorm1d" if len(shape) == 2 else "BatchNorm2d"
    plain = Block(getattr(nn, kind)(shape[1], device=device))
    ours = Fused(getattr(batchnorm, kind)(shape[1], activation="relu", device=device))
    return {"ours": ours, "eager": plain, "native": plain, "compiled": torch.compile(plain, dynamic=False)}


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> list[Tensor]:
    """x, residual and grad_output, random, in the layout."""
    tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
    return [t.to(memory_format=layout) if t.dim() == 4 else t for t in tensors]


def gradients(module: nn.Module, x: Tensor, residual: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    out = module(x, residual)
    return (out.detach(), *torch.autograd.grad(out, [x, residual, *module.parameters()], g))


def wrong_by(module: nn.Module, problem: list[Tensor]) -> float:
    """The largest ‖found − truth‖/‖truth‖ of output and gradients, the truth in float64 on the same device."""
    channels = problem[0].size(1)
    truth = Block((nn.BatchNorm1d if problem[0].dim() == 2 else nn.BatchNorm2d)(channels, device=problem[0].device))
    wanted = gradients(truth.double(), *(t.double() for t in problem))
    found = gradients(module, *problem)
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)]
    return max(float(e) for e in errors)


def median_ms(step: Step, repetitions: int) -> float:
    from triton.testing import do_bench

    return float(do_bench(step, warmup=50, rep=repetitions, return_mode="median"))


def times(module: nn.Module, problem: list[Tensor], native: bool, repetitions: int) -> tuple[float, float]:
    """Milliseconds of the forward, and of the backward."""
    x, residual, g = problem
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    leaves = [x, residual, *module.parameters()]
    with torch.backends.cudnn.flags(enabled=not native):
        forward = median_ms(lambda: module(x, residual), repetitions)
        out = module(x, residual)
        backward = median_ms(lambda: torch.autograd.grad(out, leaves, g, retain_graph=True), repetitions)
    return forward, backward


def row(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device, repetitions: int) -> str:
    tensors = problem(shape, dtype, LAYOUTS[layout], device)
    destination = torch.empty_like(tensors[0])
    copy = median_ms(lambda: destination.copy_(tensors[0]), repetitions)
    modules = contenders(shape, device)
    # float32 rounds some z next to 0 across ReLU's kink: one such element in 10⁷ is 3e-4 of a gradient's norm
    limit = 1e-3 if dtype == torch.float32 else 2e-2
    error = wrong_by(modules["ours"], tensors)
    if not error < limit:
        raise SystemExit(f"batchnorm: ours is wrong by {error:.2g} at {shape} {layout}: not timed")
    found = {name: times(m, tensors, name == "native", repetitions) for name, m in modules.items()}
    forward, backward = found["ours"]
    cells = [f"{(a + b) / copy:.2f}" for a, b in found.values()]
    reached = [f"{100 * LEAST[p] * copy / t:.0f} %" for p, t in (("forward", forward), ("backward", backward))]
    name = str(dtype).removeprefix("torch.")
    return "| " + " | ".join([f"{shape} {layout} {name}", f"{copy * 1e3:.0f}", *cells, *reached]) + " |"


def versions(device: torch.device) -> str:
    import triton

    commit = subprocess.run(
        ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return (
        f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, Triton {triton.__version__}; commit {commit}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # a timed backward keeps its graph, which compiled code that gives its buffers away refuses
    compiled_backward.donated_buffer = False
    parser.add_argument("--repetitions", type=int, default=200, help="milliseconds each median is taken over")
    repetitions = parser.parse_args().repetitions
    if not torch.cuda.is_available():
        print("batchnorm: no CUDA device, on this machine, run this where there is a GPU", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda", torch.cuda.current_device())
    head = "| shape | copy µs | ours | eager | native | compiled | forward, of bound | backward, of bound |"
    lines = [versions(device), "", "Forward + backward in copies; lower is faster.", "", head, "|---" * 8 + "|"]
    for shape in SHAPES:
        for layout in LAYOUTS if len(shape) == 4 else ["contiguous"]:
            for dtype in (torch.bfloat16, torch.float32):
                lines.append(row(shape, dtype, layout, device, repetitions))
                print(lines[-1], flush=True)
    text = PAGE.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
