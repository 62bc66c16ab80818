"""The commands and their options, declared for typer; each hands over to a function that Python users call too."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ._version import __version__
from .commands_doctor import doctor
from .experiment.training.arms import ARMS

if TYPE_CHECKING:
    from .experiment.study import StudyResult

app = typer.Typer(name="batchnorm", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback(epilog="Example:  batchnorm study --quick --out first-study")
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Batch normalization for PyTorch, end to end."""


@app.command(
    epilog="Example:  batchnorm study --data faces.csv --arms none,batch,layer --out faces-study\n\n"
    "Exit codes: 0 fine, 2 bad usage (one line says what to do), 130 interrupted (go on with --resume)."
)
def study(
    data: Annotated[
        str,
        typer.Option(
            help="digits, openml:NAME, a .npz, .npy, .csv or .parquet file, a folder of such shards or of images by "
            "class, or pkg.mod:function, which returns a torch.utils.data.Dataset."
        ),
    ] = "digits",
    model: Annotated[str, typer.Option(help="mlp, cnn or pkg.mod:function, which returns a Module.")] = "mlp",
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
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json to stdout and nothing else.")] = False,
) -> None:
    """Measure what batch normalization does to a network: train it with and without, over grids of learning
    rate, weight decay and dropout with several seeds each, and compares. Writes report.html, runs.csv and
    summary.json into --out.
    """
    from .experiment.study import study as run_study

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
        # Beside JSON the bar may only go where a person looks on.
        progress=(sys.stderr if sys.stderr.isatty() else None) if as_json else sys.stdout,
    )
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
    if "factors" in summary:
        from .experiment.report.factor_section import cell_tables, impossible_words

        for found in cell_tables(summary["factors"]):
            shown = Table(*found.head, title=found.caption, title_justify="left")
            for row in found.rows:
                shown.add_row(*row)
            console.print(shown)
        for sentence in impossible_words(summary["factors"]["cells"]):
            print(sentence)
    for path in (result.report, result.runs_csv, result.summary_json):
        print(path)


@app.command(
    name="bench",
    epilog="Example:  batchnorm bench --shapes 32x64x56x56 --dtypes float32,bfloat16\n\n"
    "Exit codes: 0 fine, 1 a value differs from float64 (nothing is timed then), 2 bad usage.",
)
def bench_command(
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

    from .bench import bench, bench_model, show, show_model

    try:
        with Console(stderr=True).status("checking values, then measuring") as status:
            if model is not None:
                result = bench_model(model, layouts, device, threads, seconds, dtypes)
                table = show_model(result)
            else:
                options = {"shapes": shapes} if shapes else {}
                result = bench(
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


app.command(
    epilog="Example:  batchnorm doctor my.models:trained --data digits --ignore BN101\n\n"
    "Exit codes: 0 fine, 1 a finding of warning or error, 2 bad usage (one line says what to do)."
)(doctor)
