"""Interleaved medians, and what a figure must not be quoted without."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._version import __version__


@dataclass(frozen=True)
class Timing:
    """20th, 50th and 80th percentile of one contender's seconds."""

    p20: float
    p50: float
    p80: float


def interleaved(contenders: Mapping[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, Timing]:
    """Each contender in turn, again and again, for about `seconds` in all."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            spent[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: _percentiles(times) for name, times in spent.items()}


def _percentiles(times: list[float]) -> Timing:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(deciles[1], deciles[4], deciles[7])


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a figure must not be quoted without."""
    preload = os.environ.get("LD_PRELOAD", "")
    return {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "allocator": "jemalloc" if "jemalloc" in preload else "other" if preload else "default malloc",
        "compiled": compiled(),
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def compiled() -> bool:
    """Whether the C++ kernels serve the CPU; without them the reference does, several times slower."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("batchnorm::forward", "CPU"))


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))
