"""The commands, each with its example and its exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .analyze_command import analyze
from .bench_command import bench
from .doctor_command import doctor, rules
from .study_command import study

__all__ = ["app"]

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


app.command(
    epilog="Example:  batchnorm study --data faces.csv --arms none,batch,layer --out faces-study\n\n"
    "Exit codes: 0 fine, 2 bad usage (one line says what to do), 130 interrupted (go on with --resume)."
)(study)
app.command(
    epilog="Example:  batchnorm analyze my-runs.csv --metric accuracy --out my-analysis\n\n"
    "Exit codes: 0 fine, 2 bad usage (one line says what to do)."
)(analyze)
app.command(
    epilog="Example:  batchnorm bench --shapes 32x64x56x56 --dtypes float32,bfloat16\n\n"
    "Exit codes: 0 fine, 1 a value differs from float64 (nothing is timed then), 2 bad usage."
)(bench)
app.command(
    epilog="Example:  batchnorm doctor my.models:trained --data digits --ignore BN101\n\n"
    "Exit codes: 0 fine, 1 a finding of warning or error, 2 bad usage (one line says what to do), 3 nothing found, but "
    "something that was given could not be examined."
)(doctor)
app.command(epilog="Example:  batchnorm rules --json")(rules)
