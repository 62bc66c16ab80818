"""Small maps in cache: `python benchmarks/small_maps.py` (a minute). The least of many calls, on one thread, in µs.

Operators alone, without autograd: what docs/kernels.md says of small maps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import batchnorm  # registers the operators
from batchnorm.bench import machine

SHAPES = [
    (64, 384, 2, 2), (64, 192, 4, 4), (8, 1152, 4, 4), (8, 672, 7, 7), (64, 144, 8, 8), (32, 256, 14, 14),
    (64, 960, 1, 1),
]  # fmt: skip
FORM = (1e-5, "relu", 0.0, 0)
OPERATORS = torch.ops.batchnorm


def least(function: Callable[[], object], calls: int = 400) -> float:
    """Microseconds; a call that something interrupted does not count."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


@torch.no_grad()
def row(shape: tuple[int, ...], layout: torch.memory_format) -> list[float]:
    x, grad = (torch.randn(shape).to(memory_format=layout) for _ in range(2))
    weight, bias, copy = torch.ones(shape[1]), torch.zeros(shape[1]), torch.empty_like(x)
    moments = OPERATORS.stats(x, None, 0)
    wanted = [True, True, True, False]
    calls: list[Callable[[], object]] = [
        lambda: copy.copy_(x),
        lambda: OPERATORS.forward(x, weight, bias, None, None, *FORM),
        lambda: OPERATORS.backward(grad, x, *moments, weight, bias, None, None, *FORM, wanted),
    ]
    return [least(call) for call in calls]


def main() -> None:
    torch.set_num_threads(1)
    print(f"batchnorm {batchnorm.__version__}", machine())
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape in SHAPES:
            copy, forward, backward = row(shape, layout)
            print(
                f"{str(layout)[6:]:18} {shape!s:18} copy {copy:6.1f} forward {forward:6.1f} backward {backward:6.1f} "
                f"{(forward + backward) / copy:5.1f} copies",
                flush=True,
            )


if __name__ == "__main__":
    main()
