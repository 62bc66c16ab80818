"""Runs in TensorBoard's event files: one folder a run, its settings in the folder's name or in HPARAMS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import UserError
from .long_table import NEEDED

_TEST = re.compile(r"test", re.IGNORECASE)


def read_tensorboard(folder: Path, metric: str = "metric") -> pd.DataFrame:
    """Return a row for each value of the metric's scalars.

    A run's arm, seed and settings come from its hyperparameters (`SummaryWriter.add_hparams`) and from ``name=value``
    in its path, as in ``arm=batch/seed=3,lr=0.1``. The metric is the scalar whose tag has ``val`` or ``eval`` and is in
    all runs; tags with ``test`` beside it are test rows.

    Raises:
        UserError: TensorBoard is not installed, a run without arm or seed, or no single metric.
    """
    runs = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    rows: list[dict[str, Any]] = []
    found = {run: _scalars_and_settings(run) for run in sorted(runs)}
    val, test = pick_tags([set(scalars) for scalars, _ in found.values() if scalars], folder, metric)
    for run, (scalars, told) in found.items():
        if not scalars:
            continue
        settings = {**dict(path_settings(run.relative_to(folder))), **told}
        if missing := [name for name in NEEDED[:2] if name not in settings]:
            raise UserError(
                f"no {' and no '.join(missing)} of run {run.name}, {folder}, log them with add_hparams or name the "
                "run's folder as in arm=batch,seed=3"
            )
        for split, tag in (("val", val), ("test", test)):
            points = dict(scalars.get(tag, ()) if tag else ())
            rows += [{**settings, "step": step, "metric": value, "split": split} for step, value in points.items()]
    return pd.DataFrame(rows)


def path_settings(path: Path) -> list[tuple[str, str]]:
    """Return the ``name=value`` pairs in a path, separated by folders or commas."""
    pairs = [part.partition("=") for part in re.split(r"[/\\,]", str(path)) if "=" in part]
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def pick_tags(tags: list[set[str]], source: Path, metric: str = "metric") -> tuple[str, str | None]:
    """Return the validation metric's name and the test metric's, if there is one.

    Raises:
        UserError: not exactly one name with ``val`` is in all runs.
    """
    shared = sorted(set.intersection(*tags)) if tags else []
    if metric in shared:
        test_name = re.sub(r"eval|val", "test", metric, flags=re.IGNORECASE)
        return metric, test_name if test_name in shared and test_name != metric else None
    test = [tag for tag in shared if _TEST.search(tag)]
    val = [tag for tag in shared if re.search(r"val|eval", tag, re.IGNORECASE) and tag not in test]
    better = [tag for tag in val if re.search(r"acc|metric|score|auc|f1", tag, re.IGNORECASE)] or val
    if len(better) != 1:
        raise UserError(
            f"{'several metrics' if better else 'no metric'} of validation ({', '.join(better or shared)[:120]}), "
            f"{source}, name one by analyze(metric=…)"
        )
    matching = [tag for tag in test if _TEST.sub("", tag) == re.sub(r"eval|val", "", better[0], flags=re.IGNORECASE)]
    return better[0], next(iter(matching or test), None)


def _scalars_and_settings(run: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Any]]:
    """Return the scalars of a run's folder by tag, and its hyperparameters."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams import plugin_data_pb2
    except ModuleNotFoundError as error:
        raise UserError(
            f"tensorboard is not installed, {run}, install it with pip install 'batchnorm[tensorboard]'"
        ) from error
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = {tag: [(e.step, float(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["tensors"]:  # add_scalar(new_style=True) and TensorFlow write scalars as tensors
        values = [(e.step, e.tensor_proto.float_val) for e in events.Tensors(tag)]
        if values and all(len(value) == 1 for _, value in values):
            found.setdefault(tag, []).extend((step, float(value[0])) for step, value in values)
    settings: dict[str, Any] = {}
    for metadata in events.summary_metadata.values():
        if metadata.plugin_data.plugin_name == "hparams":
            content = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
            for name, value in content.session_start_info.hparams.items():
                kind = value.WhichOneof("kind")
                settings[name] = getattr(value, kind) if kind else ""
    return found, settings
