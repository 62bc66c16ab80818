"""The command `study`: its options, and what is printed of the result."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..experiment.training.arms import ARMS

if TYPE_CHECKING:
    from rich.table import Table

    from ..experiment.study_result import StudyResult

__all__ = ["show_result", "study"]


def study(
    data: Annotated[
        str,
        typer.Option(
            help="digits, openml:NAME, a .npz, .npy, .csv or .parquet file, a folder of such shards or of images by "
            "class, or pkg.mod:function, which returns a torch.utils.data.Dataset."
        ),
    ] = "digits",
    model: Annotated[
        str,
        typer.Option(
            help="pkg.mod:build or path/file.py:build, written as build(arm, seed), which makes the arm itself, or as "
            "build(), from whose network the arms are made; or mlp or cnn."
        ),
    ] = "mlp",
    arms: Annotated[
        str,
        typer.Option(help=f"Comma-separated, the last is compared with the first: {', '.join(ARMS)}."),
    ] = "none,batch",
    out: Annotated[str, typer.Option(help="Folder for report.html, runs.csv and summary.json.")] = "study",
    seeds: Annotated[
        int | None, typer.Option(help="Measuring seeds a setting, at least 2.", show_default="5, quick 2")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller grid, fewer steps and seeds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Run exactly what is missing in --out.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes side by side.", show_default="the cores available")
    ] = None,
    engine: Annotated[str, typer.Option(help="local: this machine's processes; ray: a Ray cluster's.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the Ray cluster, auto for one running here.", show_default="one is started"),
    ] = None,
    log: Annotated[
        str, typer.Option(help="Show the runs elsewhere too: tensorboard, mlflow or both, comma-separated.")
    ] = "",
    lrs: Annotated[
        str | None, typer.Option(help="Learning rates, comma-separated.", show_default="half decades")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps a run.", show_default="1000, quick 600")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Samples a step, a number or full. Several, as full,256,60,8,1, are compared.", show_default="60"
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="sgd, momentum, nesterov, adam or adamw. Several, comma-separated, are compared.", show_default="sgd"
        ),
    ] = None,
    where: Annotated[
        str,
        typer.Option(help="same: in the places of the network's own normalizations; every: after each hidden layer."),
    ] = "same",
    dropout: Annotated[
        str, typer.Option(help="keep: the network's own dropout stays; replace: the grid of dropout takes its place.")
    ] = "keep",
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json to stdout and nothing else.")] = False,
) -> None:
    """Measure what batch normalization does to a network: train it with and without, over grids of learning
    rate, weight decay and dropout with several seeds each, and compares. Writes report.html, runs.csv and
    summary.json into --out.
    """
    from ..experiment.study import study as run_study

    result = run_study(
        data,
        model,
        arms,
        out,
        seeds,
        quick,
        resume,
        workers,
        engine,
        address=address,
        log=log,
        lrs=lrs,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        where=where,  # type: ignore[arg-type]  # the function refuses other words in one line
        dropout=dropout,  # type: ignore[arg-type]  # as above
        # Beside JSON the bar may only go where a person looks on.
        progress=(sys.stderr if sys.stderr.isatty() else None) if as_json else sys.stdout,
    )
    show_result(result, as_json)


def show_result(result: StudyResult, as_json: bool) -> None:
    """Print the summary as JSON, or the claims and the three files."""
    if as_json:
        print(json.dumps(result.summary, indent=1, allow_nan=False))
    else:
        _show_claims(result)


def _show_claims(result: StudyResult) -> None:
    """Print the table of the claims, then the three files, a line each and never wrapped."""
    from rich.console import Console
    from rich.table import Table

    summary = result.summary
    table = Table(title=f"{summary['compared']} against {summary['baseline']}", title_justify="left")
    for heading in ("claim", "verdict", "in words"):
        table.add_column(heading)
    for name, claim in result.claims.items():
        table.add_row(name, claim.verdict, claim.text)
    # Labels and file names may hold what rich would take for markup.
    console = Console(markup=False, highlight=False)
    console.print(table)
    if summary["comparisons"]:
        console.print(_comparisons_table(summary))
    if "factors" in summary:
        from ..experiment.report.factor_section import cell_tables, impossible_words

        for found in cell_tables(summary["factors"]):
            shown = Table(*found.head, title=found.caption, title_justify="left")
            for row in found.rows:
                shown.add_row(*row)
            console.print(shown)
        for sentence in impossible_words(summary["factors"]["cells"]):
            print(sentence)
    for path in (result.report, result.runs_csv, result.summary_json):
        print(path)


def _comparisons_table(summary: dict[str, Any]) -> Table:
    """Return all arms against the first, the claims that can be told of at least one of them."""
    from rich.table import Table

    title = f"all arms against {summary['baseline']}, verdicts corrected for their number (Holm)"
    table = Table("claim", "arm", "verdict", "estimate", title=title, title_justify="left")
    for name, entries in summary["comparisons"].items():
        for entry in entries if any(e["estimate"] is not None for e in entries) else ():
            estimate = "" if entry["estimate"] is None else f"{entry['estimate']:.3g} {entry['unit']}"
            table.add_row(name, entry["arm"], entry["verdict"], estimate)
    return table
