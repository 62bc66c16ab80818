"""Run `batchnorm bench`: choose the problems, measure them, and make the tables."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..inspect.nests import moved
from .layer_bench import CASES, DTYPES, LAYOUTS, SHAPES, SHAPES_CUDA, Problem, measure, parse_choice, parse_shapes
from .model_bench import model_step
from .timing import geometric_mean, machine

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    shapes: str = "",
    dtypes: str = "float32",
    layouts: str = ",".join(LAYOUTS),
    cases: str = "bn+relu",
    device: str = "cpu",
    threads: int | None = None,
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time the layers on this machine. Lists are comma-separated, as on the command line.

    On a GPU the times are measured by the device, with an empty L2 cache before each call. Torch is timed three times
    there: with its own choice of cuDNN, without cuDNN, and compiled.

    Returns:
        {"machine", "rows", "means"}: one row for each shape, dtype, layout and case (see `measure`), and the geometric
        means of the speedups by case and dtype.

    Raises:
        UserError: a word is unknown, a shape is not valid, or the device is missing.
    """
    _prepare(device, threads, seconds)
    problems = [
        Problem(shape, dtype, layout, case)
        for shape, dtype, layout, case in product(
            parse_shapes(shapes or (SHAPES_CUDA if device == "cuda" else SHAPES)),
            parse_choice(dtypes, DTYPES, "dtypes"),
            parse_choice(layouts, LAYOUTS, "layouts"),
            parse_choice(cases, CASES, "cases"),
        )
        if layout == "contiguous" or len(shape) > 2  # (N, C) has one layout
    ]
    rows = []
    for problem in problems:
        progress(problem.label)
        rows.append(measure(problem, device, seconds))
    return {"machine": machine(device), "rows": rows, "means": _means(rows)}


def _prepare(device: str, threads: int | None, seconds: float) -> None:
    if device not in ("cpu", "cuda"):
        raise UserError(f"unknown device {device!r}, bench(device=…), choose from cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible to torch, bench(device=cuda), run on a GPU machine or take the CPU")
    if not seconds > 0:
        raise UserError(f"{seconds:g} seconds a row, bench(seconds=…), give a positive number")
    if threads is not None:
        if threads < 1:
            raise UserError(f"{threads} threads, bench(threads=…), give at least 1")
        torch.set_num_threads(threads)


def bench_model(
    model: str,
    layouts: str,
    device: str = "cpu",
    threads: int | None = None,
    seconds: float = 1.0,
    dtypes: str = "float32",
) -> dict[str, Any]:
    """Time a training step of a user's network by layout and dtype.

    The forward uses autocast where the dtype is bfloat16.

    Args:
        model: the name of a factory, `() -> (model, example)`.

    Returns:
        {"machine", "model", "rows"}: one row for each layout and dtype (see `model_step`).

    Raises:
        UserError: the factory cannot be imported or returns something else, or the network raises.
    """
    from ..factories import find_factory

    chosen_layouts = parse_choice(layouts, LAYOUTS, "layouts")
    chosen_dtypes = parse_choice(dtypes, ("float32", "bfloat16"), "dtypes")
    _prepare(device, threads, seconds)
    rows = []
    for layout, dtype in product(chosen_layouts, chosen_dtypes):
        try:
            made = find_factory(model, "bench_model(model=…)")()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the factory raises ({str(error).splitlines()[0]}), bench_model(model={model}), correct it"
            ) from error
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)):
            raise UserError(
                f"the factory returns {type(made).__name__}, bench_model(model={model}), return (model, example input)"
            )
        network, example = made
        rows.append(model_step(network.to(device), moved(example, torch.device(device)), seconds, layout, dtype))
    return {"machine": machine(device), "model": model, "rows": rows}


def show_model(result: dict[str, Any]) -> Table:
    """Make the table of a network's training step for the terminal."""
    from rich.table import Table

    facts = result["machine"]
    title = f"training step of {result['model']} · torch {facts['torch']} · {facts['threads']} threads"
    caption = "MB: kept after the forward by normalizations + by others, and the peak of a step"
    table = Table(title=f"{title} · {facts['allocator']}", caption=caption, title_justify="left")
    kinds = ("torch", "ours", "save_memory")
    for heading in (
        "layout",
        "dtype",
        "BN layers",
        "torch ms",
        "ours ms",
        "speedup",
        *(f"{kind} MB" for kind in kinds),
    ):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        times = row["seconds"]
        table.add_row(
            row["layout"], row["dtype"], str(row["layers"]), f"{times['torch']['p50'] * 1e3:.1f}",
            f"{times['ours']['p50'] * 1e3:.1f}", f"{row['speedup']:.2f}×",
            *(_megabytes(row["memory"][kind]) for kind in kinds),
        )  # fmt: skip
    return table


def _megabytes(memory: dict[str, int]) -> str:
    kept, others, peak = (memory[name] / 1e6 for name in ("normalizations", "others", "peak"))
    return f"{kept:.1f} + {others:.1f}, {peak:.1f}"


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"{row['case']} {row['dtype']}", []).append(row["both"]["speedup"])
    return {name: geometric_mean(values) for name, values in groups.items()}


def show(result: dict[str, Any]) -> Table:
    """Make the table of the layers for the terminal."""
    from rich.table import Table

    facts, gpu = result["machine"], "cuda" in result["machine"]
    title = f"batchnorm {facts['batchnorm']} against torch {facts['torch']} · {facts['processor']} · "
    if gpu:
        title += f"CUDA {facts['cuda']} · cuDNN {facts['cudnn']} · Triton {facts['triton']}"
    else:
        title += f"{facts['threads']} threads · {facts['allocator']}"
    caption = "fwd, fwd+bwd: torch's time over ours (in place: torch with in-place add and ReLU"
    caption += "; native: torch without cuDNN; compiled: torch.compile" if gpu else ""
    caption += (
        "); copies: ours over a copy of the tensor; least: copies that the memory traffic allows; mean: geometric"
    )
    table = Table(title=title, caption=caption, title_justify="left")
    for heading in ("shape", "dtype", "layout", "case"):
        table.add_column(heading, overflow="fold")
    others = ("in place", "native", "compiled") if gpu else ("in place",)
    for heading in ("fwd", "fwd+bwd", *others, "copies", "least"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        both = row["both"]
        speedups = [both.get(f"speedup_{other.replace(' ', '_')}") for other in others]
        table.add_row(
            "x".join(map(str, row["shape"])), row["dtype"], row["layout"], row["case"],
            f"{row['forward']['speedup']:.2f}×", f"{both['speedup']:.2f}×",
            *("" if speedup is None else f"{speedup:.2f}×" for speedup in speedups),
            f"{both['copies']:.1f}", f"{row['least_copies']:.1f}",
        )  # fmt: skip
    for name, mean in result["means"].items():
        table.add_row("mean", "", "", name, "", f"{mean:.2f}×", *[""] * (len(others) + 2), style="bold")
    return table
