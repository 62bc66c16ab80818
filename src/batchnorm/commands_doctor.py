"""The command `doctor`: arguments and what is printed; the work is `batchnorm.doctor`'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError

if TYPE_CHECKING:
    from .doctor.diagnosis import Diagnosis
    from .doctor.fix import Mending


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
    select: Annotated[str | None, typer.Option(help="Only these codes or prefixes, as BN202,BN1.")] = None,
    ignore: Annotated[str | None, typer.Option(help="Not these codes or prefixes.")] = None,
    explain: Annotated[str | None, typer.Option(help="Print a rule's page and do nothing else.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe and write the state to --out.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="State file that --fix writes, never over another.", show_default="mended.pt")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout and nothing else.")] = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="Print SARIF 2.1.0 to stdout and nothing else.")] = False,
) -> None:
    """Names what is wrong with batch normalization in a model, with evidence and the line that mends it."""
    if explain is not None:
        _explain(explain)
        return
    if target is None:
        raise UserError("nothing to examine, batchnorm doctor, give pkg.mod:function, FILE.onnx or FILE.pt2")
    if as_json and as_sarif:
        raise UserError("--json and --sarif together, batchnorm doctor, choose one")
    from .doctor.examine import diagnose
    from .doctor.subject import read_data, subject

    model, batches = subject(target)
    given: Any = read_data(data, batch_size) if data is not None else batches
    options: dict[str, Any] = {"mask": mask, "steps": steps, "select": select, "ignore": ignore}
    if state is not None or fix:
        _load(model, state)
    if fix:
        mending, written = _mend(model, given, out, options)
        assert mending.diagnosis is not None
        _show(mending.diagnosis, as_json, as_sarif, mending, written)
        raise typer.Exit(mending.diagnosis.exit_code)
    diagnosis = diagnose(model, given, **options)
    _show(diagnosis, as_json, as_sarif)
    raise typer.Exit(diagnosis.exit_code)


def _explain(code: str) -> None:
    from .doctor.pages import page

    print(page(code), end="")


def _load(model: Any, state: Path | None) -> None:
    from .doctor.subject import load_state

    if isinstance(model, Path):
        raise UserError(f"--fix and --state are for models, {model}, name the function that makes the model")
    if state is not None:
        load_state(model, state)


def _mend(model: Any, batches: Any, out: Path | None, options: dict[str, Any]) -> tuple[Mending, Path]:
    from .doctor.fix import mend
    from .doctor.subject import save_state

    if out is not None and out.exists():  # before the work, not after it
        raise UserError(f"the file exists already, --out {out}, choose another name")
    mending = mend(model, batches, **options)
    return mending, save_state(model, out)


def _show(
    diagnosis: Diagnosis, as_json: bool, as_sarif: bool, mending: Mending | None = None, written: Path | None = None
) -> None:
    if as_sarif:
        from .doctor.report.sarif import to_sarif

        print(json.dumps(to_sarif(diagnosis), indent=1, allow_nan=False))
    elif as_json:
        mended = {} if mending is None else {"mending": {**mending.as_dict(), "written": str(written)}}
        print(json.dumps({**diagnosis.as_dict(), **mended}, indent=1, allow_nan=False))
    else:
        from rich.console import Console

        from .doctor.report.table import print_diagnosis, print_mending

        # Names of modules may hold what rich would take for markup.
        console = Console(markup=False, highlight=False)
        if mending is not None:
            print_mending(mending, console)
        print_diagnosis(diagnosis, console)
        if written is not None:
            print(written)
