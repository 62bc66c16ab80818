"""The command `analyze`: its options; the result is printed as a study's."""

from __future__ import annotations

from typing import Annotated

import typer

from .study_command import show_result

__all__ = ["analyze"]


def analyze(
    table: Annotated[
        str,
        typer.Argument(
            help="A CSV file with the columns arm,seed,step,metric (optional: split, lr and other settings), a folder "
            "of them, of TensorBoard's event files or of MLflow."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for report.html, runs.csv and summary.json.")] = "analysis",
    target: Annotated[
        float | None,
        typer.Option(help="The value whose arrival is compared.", show_default="what the first arm attains"),
    ] = None,
    chance: Annotated[
        float | None,
        typer.Option(help="The value without learning; a diverged run counts as this.", show_default=False),
    ] = None,
    metric: Annotated[str, typer.Option(help="The metric's name in texts, and in a log that has several.")] = "metric",
    direction: Annotated[str, typer.Option(help="max or min: which is better.")] = "max",
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json to stdout and nothing else.")] = False,
) -> None:
    """Judge runs that another program has trained: claims with 95 % intervals, verdicts and the report from a table of
    logged values. The first arm in the table is the baseline.
    """
    from ..experiment.analyze import analyze as run_analyze

    result = run_analyze(
        table,
        out,
        target=target,
        chance=chance,
        metric=metric,
        direction=direction,  # type: ignore[arg-type]  # the function refuses other words in one line
    )
    show_result(result, as_json)
