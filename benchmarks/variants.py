"""What each variant costs: against the plain layer, and against the loop that people write instead.

    python benchmarks/variants.py [--rounds N] [--out docs/variants/benchmarks.md]

Forward and backward in float32 on the CPU. Within a round every contender runs once, in turn, so that what the
machine does meanwhile falls on all alike; a row is a median of the rounds' ratios. Values are checked before anything
is timed. Synchronized statistics have no row: in one process there is nothing to synchronize.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import BatchNorm1d, BatchNorm2d, Renorm

Step = Callable[[], Tensor]
IMAGES, SEQUENCES = (32, 64, 56, 56), (32, 256, 128)


class Row(NamedTuple):
    """A variant, what it is held against, and a target for the first ratio (None: none was set)."""

    name: str
    variant: Step
    plain: Step
    loop: Step | None
    loop_is: str
    target: float | None


def step(call: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Step:
    """One forward and backward; returns the gradient of the input."""

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        call(leaf).backward(g)
        assert leaf.grad is not None
        return leaf.grad

    return run


def ghost() -> Row:
    x, g = torch.randn(IMAGES), torch.randn(IMAGES)
    layer, plain, torchs = BatchNorm2d(64, ghost_batch_size=8), BatchNorm2d(64), nn.BatchNorm2d(64)

    def loop(x: Tensor) -> Tensor:
        return torch.cat([torchs(part) for part in x.split(8)])

    return Row("ghost", step(layer, x, g), step(plain, x, g), step(loop, x, g), "torch's layer on each chunk", 1.1)


def masked() -> Row:
    x = torch.randn(SEQUENCES)
    mask = batchnorm.lengths_to_mask(torch.randint(64, 129, (32,)), 128)
    g = torch.randn(SEQUENCES) * mask.unsqueeze(1)
    layer, plain, torchs = BatchNorm1d(256), BatchNorm1d(256), nn.BatchNorm1d(256)

    def loop(x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        return torch.zeros_like(rows).masked_scatter(mask.unsqueeze(-1), torchs(rows[mask])).transpose(1, 2)

    # a gradient of zero at the padding: the loop has none there, ours passes on what arrives
    variant = step(lambda x: layer(x, mask=mask), x, g)
    return Row("masked", variant, step(plain, x, g), step(loop, x, g), "gather, torch's layer, scatter", 1.5)


def frozen() -> Row:
    x, g = torch.randn(IMAGES), torch.randn(IMAGES)
    layer, plain, torchs = BatchNorm2d(64), BatchNorm2d(64).eval(), nn.BatchNorm2d(64)
    layer.frozen = True

    def loop(x: Tensor) -> Tensor:
        return torchs.eval()(x)

    return Row(
        "frozen", step(layer, x, g), step(plain, x, g), step(loop, x, g), "torch's layer, .eval() each step", 1.0
    )


def renorm() -> Row:
    x, g = torch.randn(IMAGES), torch.randn(IMAGES)
    layer, plain = BatchNorm2d(64, renorm=Renorm(3.0, 5.0)), BatchNorm2d(64)
    mean, var = torch.zeros(64), torch.ones(64)

    def loop(x: Tensor) -> Tensor:
        """The formula in torch's operators, as implementations on the web have it."""
        dims = (0, 2, 3)
        mu, sigma = x.mean(dims), (x.var(dims, correction=0) + 1e-5).sqrt()
        running = (var + 1e-5).sqrt()
        r = (sigma.detach() / running).clamp(1 / 3, 3)
        d = ((mu.detach() - mean) / running).clamp(-5, 5)
        hat = (x - mu.view(1, -1, 1, 1)) / sigma.view(1, -1, 1, 1) * r.view(1, -1, 1, 1) + d.view(1, -1, 1, 1)
        mean.lerp_(mu.detach(), 0.1)
        var.lerp_(x.detach().var(dims), 0.1)
        return hat

    return Row(
        "renorm", step(layer, x, g), step(plain, x, g), step(loop, x, g), "the formula in torch's operators", None
    )


def feature_axis() -> Row:
    shape = (SEQUENCES[0], SEQUENCES[2], SEQUENCES[1])
    x, g = torch.randn(shape), torch.randn(shape)
    layer, plain, torchs = BatchNorm1d(256, feature_axis=-1), BatchNorm1d(256), nn.BatchNorm1d(256)

    def loop(x: Tensor) -> Tensor:
        return torchs(x.transpose(1, 2)).transpose(1, 2)

    other = step(plain, x.transpose(1, 2).contiguous(), g.transpose(1, 2).contiguous())
    return Row("feature_axis", step(layer, x, g), other, step(loop, x, g), "transpose, torch's layer, transpose", None)


def accumulation() -> Row:
    x, g = torch.randn(IMAGES), torch.randn(IMAGES)
    layer, plain, torchs = BatchNorm2d(64, accumulation_steps=4), BatchNorm2d(64), nn.BatchNorm2d(64, momentum=0.1 / 4)
    run, loop = step(layer, x, g), step(torchs, x, g)
    return Row(
        "accumulation", run, step(plain, x, g), loop, "torch's layer at momentum/k (not the same statistics)", None
    )


def check(row: Row) -> None:
    """The variant and the loop give the same gradient, before either is timed."""
    if row.loop is not None:
        torch.testing.assert_close(row.variant(), row.loop(), rtol=1e-3, atol=1e-4)


def measured(row: Row, rounds: int) -> tuple[float, float | None]:
    """Medians of (variant ÷ plain, loop ÷ variant) over interleaved rounds."""
    contenders = [row.variant, row.plain, *([row.loop] if row.loop else [])]
    ratios = []
    for turn in range(rounds + 1):
        seconds = {}
        for contender in contenders if turn % 2 else reversed(contenders):
            start = time.perf_counter()
            contender()
            seconds[contender] = time.perf_counter() - start
        if turn:  # the first warms up
            loop = seconds[row.loop] / seconds[row.variant] if row.loop else None
            ratios.append((seconds[row.variant] / seconds[row.plain], loop))
    over_plain = statistics.median(r for r, _ in ratios)
    return over_plain, statistics.median(loop for _, loop in ratios if loop is not None) if row.loop else None


def page(lines: list[str], rounds: int) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    allocator = "jemalloc" if "jemalloc" in os.environ.get("LD_PRELOAD", "") else "default malloc"
    origin = (
        f"torch {torch.__version__}, batchnorm {batchnorm.__version__} at {commit.stdout.strip() or 'no commit'}, "
        f"Python {platform.python_version()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} thread, {allocator}"
    )
    return f"""# What the variants cost

Forward and backward, float32, CPU: medians of {rounds} interleaved rounds, so ratios and no times. "Against plain" is
variant ÷ plain layer of ours (for frozen: ÷ our layer in evaluation): 1.00 costs nothing. "Against the loop" is how
many times faster than what people write instead, whose gradient was checked to be the same first. Images {IMAGES},
sequences {SEQUENCES} (N, C, ·). Synchronized statistics have no row: one process has nothing to synchronize.

| variant | against plain | target | against the loop | the loop |
|---|---|---|---|---|
{chr(10).join(lines)}

{origin}. Made by `python benchmarks/variants.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("docs/variants/benchmarks.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = []
    for make in (ghost, masked, frozen, renorm, feature_axis, accumulation):
        row = make()
        check(row)
        over_plain, over_loop = measured(row, options.rounds)
        target = f"≤ {row.target}" if row.target else "none"
        faster = "" if over_loop is None else f"{over_loop:.2f} × faster"
        lines.append(f"| {row.name} | {over_plain:.2f} × | {target} | {faster} | {row.loop_is} |")
        print(lines[-1], flush=True)
    options.out.write_text(page(lines, options.rounds))


if __name__ == "__main__":
    main()
