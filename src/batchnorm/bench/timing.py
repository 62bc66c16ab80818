"""Time functions interleaved, and describe the machine that the times belong to."""

from __future__ import annotations

import importlib.metadata
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
    """The 20th, 50th and 80th percentile of one function's seconds."""

    p20: float
    p50: float
    p80: float


Clock = Callable[[Callable[[], object]], float]


def host_clock(function: Callable[[], object]) -> float:
    """Return the seconds that one call takes on the host."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class DeviceClock:
    """Measure the seconds that a GPU works on one call, by CUDA events, with an empty L2 cache before the call.

    The GPU sleeps until the host has launched everything, so the time of the host is not included. The result is what
    the work costs in a CUDA graph, or where the GPU is busy with earlier work.
    """

    MAX_CYCLES = 20_000_000  # about 10 ms

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.zeros(cache, dtype=torch.float32, device="cuda")
        self._cycles = 200_000

    def __call__(self, function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # a read: after a write, the cache would write back to memory during the call
        torch.cuda._sleep(self._cycles)
        begin.record()
        host = host_clock(function)
        end.record()
        end.synchronize()
        # a host that is slower than the sleep makes the time too long: sleep longer at the next call
        self._cycles = max(self._cycles, min(self.MAX_CYCLES, int(3e9 * host)))
        return begin.elapsed_time(end) / 1e3


def clock_of(device: str) -> Clock:
    """Return the clock for a device: "cpu" or "cuda"."""
    return DeviceClock() if device == "cuda" else host_clock


def interleaved(
    contenders: Mapping[str, Callable[[], object]], seconds: float, least: int = 7, clock: Clock = host_clock
) -> dict[str, Timing]:
    """Call the functions in turn for about `seconds` in total, at least `least` rounds. Returns the times of each."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, function in contenders.items():
            spent[name].append(clock(function))
        rounds += 1
    return {name: _percentiles(times) for name, times in spent.items()}


def _percentiles(times: list[float]) -> Timing:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(deciles[1], deciles[4], deciles[7])


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine and the versions. A time has no meaning without them."""
    preload = os.environ.get("LD_PRELOAD", "")
    gpu = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": _triton_version()}
    return (gpu if device == "cuda" else {}) | {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "allocator": "jemalloc" if "jemalloc" in preload else "other" if preload else "default malloc",
        "compiled": compiled(),
    }


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def compiled() -> bool:
    """Return whether the C++ kernels compute on the CPU. If not, the reference does, which is several times slower."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("batchnorm::forward", "CPU"))


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))
