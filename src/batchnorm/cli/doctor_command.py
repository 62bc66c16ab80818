"""The command `doctor`: its options, and what is printed of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..doctor.diagnosis import Diagnosis
    from ..doctor.repair import RepairReport

__all__ = ["doctor"]


def doctor(
    target: Annotated[
        str | None,
        typer.Argument(help="pkg.mod:function -> model or (model, batches); or FILE.onnx, FILE.pt2."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, openml:NAME, a .npz, .npy, .csv or .parquet file, a folder of such shards or of images by "
            "class, or pkg.mod:function -> batches."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch of --data.", min=1)] = 64,
    mask: Annotated[str | None, typer.Option(help="The batches' key that holds the mask.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps that are planned.")] = None,
    state: Annotated[Path | None, typer.Option(help="A state_dict file to load into the model first.")] = None,
    select: Annotated[str | None, typer.Option(help="Only these codes or prefixes of codes, comma-separated.")] = None,
    ignore: Annotated[str | None, typer.Option(help="Not these codes or prefixes of codes.")] = None,
    explain: Annotated[str | None, typer.Option(help="Print a rule's page and do nothing else.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what is safe and write the state to --out.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="State file that --fix writes, never over another.", show_default="mended.pt")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else.")] = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="Print SARIF 2.1.0 to stdout and nothing else.")] = False,
) -> None:
    """Name what is wrong with batch normalization in a model, with evidence and the line that repairs it."""
    if explain is not None:
        _explain(explain)
        return
    if target is None:
        raise UserError("nothing to examine, batchnorm doctor, give pkg.mod:function, FILE.onnx or FILE.pt2")
    if as_json and as_sarif:
        raise UserError("--json and --sarif together, batchnorm doctor, choose one")
    options = {"mask": mask, "steps": steps, "select": select, "ignore": ignore}
    diagnosis, repaired, written = _examine(target, data, batch_size, state, fix, out, options)
    _show(diagnosis, as_json, as_sarif, repaired, written)
    raise typer.Exit(diagnosis.exit_code)


def _explain(code: str) -> None:
    from ..doctor.pages import page

    print(page(code), end="")


def _examine(
    target: str,
    data: str | None,
    batch_size: int,
    state: Path | None,
    fix: bool,
    out: Path | None,
    options: dict[str, Any],
) -> tuple[Diagnosis, RepairReport | None, Path | None]:
    from ..doctor.examine import diagnose
    from ..doctor.repair import repair
    from ..doctor.subject import check_new, load_state, read_data, save_state, subject

    model, batches = subject(target)
    given = read_data(data, batch_size) if data is not None else batches
    if isinstance(model, Path):
        if state is not None or fix:
            raise UserError(f"--fix and --state are for models, {model}, name the function that makes the model")
        return diagnose(model, given, **options), None, None
    if state is not None:
        load_state(model, state)
    if not fix:
        return diagnose(model, given, **options), None, None
    check_new(out)  # before the work, not after it
    report = repair(model, given, **options)
    return report.diagnosis, report, save_state(model, out)


def _show(
    diagnosis: Diagnosis, as_json: bool, as_sarif: bool, repaired: RepairReport | None, written: Path | None
) -> None:
    if as_sarif:
        from ..doctor.report.sarif import to_sarif

        print(json.dumps(to_sarif(diagnosis), indent=1, allow_nan=False))
    elif as_json:
        repair = {} if repaired is None else {"mending": {**repaired.as_dict(), "written": str(written)}}
        print(json.dumps({**diagnosis.as_dict(), **repair}, indent=1, allow_nan=False))
    else:
        from rich.console import Console

        from ..doctor.report.table import print_diagnosis, print_repair

        # Names of modules may hold what rich would take for markup.
        console = Console(markup=False, highlight=False)
        if repaired is not None:
            print_repair(repaired, console)
        print_diagnosis(diagnosis, console)
        if written is not None:
            print(written)
