"""The commands `doctor` and `rules`: their options, and what is printed of the result."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ..doctor.diagnosis import Diagnosis
    from ..doctor.repair import RepairReport
    from ..doctor.subject import Subject

__all__ = ["OutputFormat", "doctor", "rules"]


class OutputFormat(StrEnum):
    """How a diagnosis is printed."""

    CONCISE = "concise"
    FULL = "full"
    JSON = "json"
    SARIF = "sarif"
    GITHUB = "github"
    JUNIT = "junit"


@dataclass
class _Result:
    """What was found, and what `--fix` did and wrote."""

    about: Subject
    diagnosis: Diagnosis
    report: RepairReport | None = None
    patch: str = ""
    tensors: tuple[str, ...] = ()
    written: Path | None = None

    @property
    def exit_code(self) -> int:
        if self.report is None:
            return self.diagnosis.exit_code
        return 1 if self.patch else self.report.exit_code  # what the patch holds is not mended until it is applied


def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            help="pkg.mod:name or path/file.py:name of a model, or of a function -> model, (model, batches) or a dict "
            "of what diagnose takes; or FILE.onnx, FILE.pt2, or a checkpoint."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, openml:NAME, a .npz, .npy, .csv or .parquet file, a folder of such shards or of images by "
            "class, or pkg.mod:function -> batches."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a batch of --data.", min=1)] = 64,
    mask: Annotated[
        str | None, typer.Option(help="The batches' key that holds the mask, or pkg.mod:function of a batch.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="pkg.mod:function of (output, target) -> how good it is, larger is better.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="SGD, AdamW, … of torch.optim, or pkg.mod:function of the model.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(help="pkg.mod:function of (batch), (model, batch) or (model, optimizer, batch): a training step."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps that are planned.")] = None,
    state: Annotated[Path | None, typer.Option(help="A checkpoint to load into the model first.")] = None,
    select: Annotated[str | None, typer.Option(help="Only these codes, prefixes of codes or names.")] = None,
    ignore: Annotated[str | None, typer.Option(help="Not these codes, prefixes of codes or names.")] = None,
    explain: Annotated[str | None, typer.Option(help="Print a rule's page and do nothing else.")] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Repair, measure that it helps, write the state to --out; print the rest.")
    ] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show what --fix would change and write nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="State file that --fix writes, never over another.", show_default="mended.pt")
    ] = None,
    output_format: Annotated[
        OutputFormat | None,
        typer.Option(help="How to print the result.", show_default="full, and concise where stdout is no terminal"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --output-format json.")] = False,
    as_sarif: Annotated[bool, typer.Option("--sarif", help="The same as --output-format sarif.")] = False,
) -> None:
    """Name what is wrong with batch normalization in a model, with evidence and the line that repairs it."""
    if explain is not None:
        from ..doctor.pages import page

        print(page(explain), end="")
        return
    if target is None:
        raise UserError("nothing to examine, batchnorm doctor, give pkg.mod:function, a model's file or a checkpoint")
    form = _format(output_format, as_json, as_sarif)
    about = _subject(target, data, batch_size, state, fix or diff)
    about.arguments |= _named(about, mask=mask, metric=metric, optimizer=optimizer, step=step, steps=steps)
    about.arguments |= _chosen(select, ignore)
    result = _examine(about, fix or diff, None if diff else out, write=not diff)
    _print(result, form)
    raise typer.Exit(result.exit_code)


def rules(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """List the rules: code, name, what each needs, whether --fix repairs it, and what it finds."""
    from ..doctor.rules import all_rules

    rows = [
        {
            "code": rule.code,
            "name": rule.name,
            "needs": list(rule.needs),
            "repair": "none" if rule.repair is None else "unsafe" if rule.unsafe else "safe",
            "summary": rule.summary,
            "fix": rule.fix,
        }
        for rule in all_rules()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['code']}  {row['name']:<29} {row['repair']:<7} {row['summary']}")


def _format(output_format: OutputFormat | None, as_json: bool, as_sarif: bool) -> OutputFormat:
    asked = [output_format, OutputFormat.JSON if as_json else None, OutputFormat.SARIF if as_sarif else None]
    given = {form for form in asked if form is not None}
    if len(given) > 1:
        flags = " and ".join(sorted(f"--{form}" for form in given))
        raise UserError(f"{flags} together, batchnorm doctor, choose one")
    return next(iter(given), OutputFormat.FULL if sys.stdout.isatty() else OutputFormat.CONCISE)


def _subject(target: str, data: str | None, batch_size: int, state: Path | None, fix: bool) -> Subject:
    from torch import nn

    from ..doctor.checkpoints import load_state
    from ..doctor.subject import read_data, subject

    about = subject(target)
    if data is not None:
        about.arguments["batches"] = read_data(data, batch_size)
    if not isinstance(about.model, nn.Module):
        if state is not None or fix:
            raise UserError(f"--fix and --state are for models, {target}, name the function that makes the model")
    elif state is not None:
        load_state(about.model, state)
    return about


def _named(about: Subject, **names: Any) -> dict[str, Any]:
    """Return the arguments that the options name; `--step` gets the model and the optimizer."""
    from ..doctor.subject import find_function, make_optimizer, make_step

    given = {name: value for name, value in names.items() if value is not None}
    if "mask" in given:
        given["mask"] = find_function(given["mask"], "diagnose(mask=…)", "a mask")
    if "metric" in given:
        if ":" not in given["metric"]:
            raise UserError(f"no pkg.mod:function, --metric {given['metric']}, name a function of (output, target)")
        given["metric"] = find_function(given["metric"], "diagnose(metric=…)", "a number")
    if "optimizer" in given:
        given["optimizer"] = make_optimizer(given["optimizer"], about.model)  # type: ignore[arg-type]  # diagnose refuses what a file cannot have
    if "step" in given:
        optimizer = given.get("optimizer", about.arguments.get("optimizer"))
        given["step"] = make_step(given["step"], about.model, optimizer)  # type: ignore[arg-type]  # as above
    return given


def _chosen(select: str | None, ignore: str | None) -> dict[str, Any]:
    """Return which rules to ask: by the options, else by [tool.batchnorm] of the project."""
    from ..doctor.config import read_config

    config = read_config(Path.cwd())
    return {
        "select": select if select is not None else config.select,
        "ignore": [*config.ignore, *(ignore.split(",") if ignore is not None else [])] or None,
        "per_layer_ignores": config.per_layer_ignores,
    }


def _examine(about: Subject, fix: bool, out: Path | None, write: bool) -> _Result:
    from ..doctor.examine import diagnose
    from ..doctor.patch import patch_of
    from ..doctor.repair import repair
    from ..doctor.subject import changed_tensors, check_new, copied_state, save_state

    if not fix:
        return _Result(about, diagnose(about.model, **about.arguments))
    assert not isinstance(about.model, Path)
    check_new(out)  # before the work, not after it
    before = copied_state(about.model)
    report = repair(about.model, **about.arguments)
    tensors = changed_tensors(before, about.model)
    result = _Result(about, report.diagnosis, report, patch_of(report.changes, about.factory), tuple(tensors))
    if tensors and write:
        result.written = save_state(about.model, out)
    return result


def _print(result: _Result, form: OutputFormat) -> None:
    from ..doctor.report import lines
    from ..doctor.report.locations import Location, locate
    from ..doctor.report.sarif import to_sarif

    def place(layer: str) -> Location | None:
        return locate(result.about.model, result.about.factory, layer)

    if form is OutputFormat.SARIF:
        print(json.dumps(to_sarif(result.diagnosis, place), indent=1, allow_nan=False))
    elif form is OutputFormat.JSON:
        print(json.dumps({**result.diagnosis.as_dict(), **_of_repair(result)}, indent=1, allow_nan=False))
    elif form is OutputFormat.JUNIT:
        print(lines.junit(result.diagnosis))
    elif form is OutputFormat.GITHUB:
        print("\n".join(lines.github(result.diagnosis, place)))
    else:
        _print_for_people(result, form)


def _of_repair(result: _Result) -> dict[str, Any]:
    if result.report is None:
        return {}
    extra = {"patch": result.patch, "tensors": list(result.tensors), "exit_code": result.exit_code}
    written = None if result.written is None else str(result.written)
    return {"mending": {**result.report.as_dict(), **extra, "written": written}, "exit_code": result.exit_code}


def _print_for_people(result: _Result, form: OutputFormat) -> None:
    from rich.console import Console

    from ..doctor.report.lines import concise
    from ..doctor.report.table import print_diagnosis, print_repair

    # Names of modules may hold what rich would take for markup.
    console = Console(markup=False, highlight=False)
    if result.report is not None:
        if form is OutputFormat.FULL:
            print_repair(result.report, console)
        print("\n".join(result.report.summary()))
    if form is OutputFormat.FULL:
        print_diagnosis(result.diagnosis, console)
    else:
        print("\n".join(concise(result.diagnosis)))
    if result.patch:
        print("what a state_dict cannot hold, as a patch; until it is applied, these findings stay:")
        print(result.patch, end="")
    if result.tensors:
        print(f"changed tensors: {', '.join(result.tensors)}")
    if result.written is not None:
        print(result.written)
