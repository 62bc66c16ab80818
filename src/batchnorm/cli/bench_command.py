"""The command `bench`: its options, and what is printed of the result."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

__all__ = ["bench"]


def bench(
    shapes: Annotated[str, typer.Option(help="N x C x sizes, comma-separated.", show_default="a ResNet-50's")] = "",
    dtypes: Annotated[
        str, typer.Option(help="float32, float64, bfloat16, float16; with --model float32, bfloat16 (autocast).")
    ] = "float32",
    layouts: Annotated[str, typer.Option(help="contiguous, channels_last.")] = "contiguous,channels_last",
    cases: Annotated[str, typer.Option(help="bn, bn+relu, bn+add+relu.")] = "bn+relu",
    model: Annotated[
        str | None,
        typer.Option(help="pkg.mod:function -> (model, example): a whole training step instead of single layers."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="torch's threads.", show_default="torch's own")] = None,
    seconds: Annotated[float, typer.Option(help="Measuring time a row.")] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result to stdout as JSON and nothing else.")
    ] = False,
) -> None:
    """Measure the layers on this machine: forward and backward, against torch eager and against a copy.

    With --device cuda also against torch without cuDNN and torch.compile, in the device's own time.
    """
    from rich.console import Console

    from ..bench import bench as bench_layers
    from ..bench import bench_model, show, show_model

    try:
        with Console(stderr=True).status("checking values, then measuring") as status:
            if model is not None:
                result = bench_model(model, layouts, device, threads, seconds, dtypes)
                table = show_model(result)
            else:
                options = {"shapes": shapes} if shapes else {}
                result = bench_layers(
                    **options, dtypes=dtypes, layouts=layouts, cases=cases, device=device, threads=threads,
                    seconds=seconds, progress=status.update,
                )  # fmt: skip
                table = show(result)
    except AssertionError as error:  # a value that is wrong: the comparison failed, and no time is shown
        print(f"batchnorm: {error}, nothing was timed, please report it", file=sys.stderr)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        Console(highlight=False).print(table)
