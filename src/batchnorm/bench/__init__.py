"""Measure how fast the layers are on this machine, for `batchnorm bench` and for benchmarks/."""

from .layer_bench import CASES, DTYPES, LAYOUTS, Problem, check_values, evaluation, measure, parse_shapes
from .model_bench import model_step, step_memory, training_step
from .run import bench, bench_model, show, show_model
from .step_memory import StepMemory, StorageCount, process_peak
from .timing import DeviceClock, Timing, clock_of, geometric_mean, interleaved, machine

__all__ = [
    "CASES",
    "DTYPES",
    "LAYOUTS",
    "DeviceClock",
    "Problem",
    "StepMemory",
    "StorageCount",
    "Timing",
    "bench",
    "bench_model",
    "check_values",
    "clock_of",
    "evaluation",
    "geometric_mean",
    "interleaved",
    "machine",
    "measure",
    "model_step",
    "parse_shapes",
    "process_peak",
    "show",
    "show_model",
    "step_memory",
    "training_step",
]
