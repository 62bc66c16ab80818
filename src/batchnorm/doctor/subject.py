"""From names to what is examined: factories, files, data, state files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, quote_error
from ..factories import find_factory
from .evidence.exported_files import FILE_TYPES
from .evidence.input_batches import ENOUGH_SAMPLES

__all__ = ["check_new", "load_state", "read_data", "save_state", "subject"]


def subject(target: str) -> tuple[nn.Module | Path, Iterable[Any] | None]:
    """Return what a name stands for.

    Args:
        target: ``pkg.mod:function``, which makes a model or (model, batches), or the path of an .onnx or .pt2 file.

    Returns:
        The model and its batches, or the path; None where there are no batches.

    Raises:
        UserError: no such thing; the factory raises, or returns something else.
    """
    if Path(target).suffix.lower() in FILE_TYPES:
        return Path(target), None
    if ":" not in target:
        raise UserError(f"neither pkg.mod:function nor an .onnx or .pt2 file, {target}, name a function or a file")
    made = _call(target, "subject(target=…)", "a torch.nn.Module")
    model, batches = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the function returns {type(model).__name__}, {target}, return a torch.nn.Module or (model, batches)"
        )
    return model, batches


def _call(name: str, parameter: str, returns: str) -> Any:
    function = find_factory(name, parameter, returns)
    try:
        return function()
    except Exception as error:
        raise UserError(f"the function raises ({quote_error(error)}), {parameter} {name}, correct it") from error


def read_data(data: str, batch_size: int) -> Iterable[Any]:
    """Return batches (input, label) of a data source.

    Args:
        data: a source of the study's kinds, read in random order, or ``pkg.mod:function``, which returns batches. Of a
            source that is too large to be held, only as many samples as the examination takes are read.
        batch_size: samples in each batch of a source. Samples that fill no batch are left out, because a smaller batch
            would be the doctor's and not the user's.

    Raises:
        UserError: the source cannot be read.
    """
    if ":" in data and not data.startswith("openml:") and not Path(data).exists():
        made: Iterable[Any] = _call(data, "read_data(data=…)", "the data")
        return made
    import numpy as np

    from ..experiment.data.opening import find

    samples = find(data).some(ENOUGH_SAMPLES + batch_size, 0)
    labels = np.unique(samples.y, return_inverse=True)[1]
    x = torch.from_numpy(np.ascontiguousarray(samples.x)).float()
    y = torch.from_numpy(labels.reshape(-1)).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    full = order[: max(len(order) - len(order) % batch_size, min(batch_size, len(order)))]
    return [(x[chosen], y[chosen]) for chosen in full.split(batch_size)]


def load_state(model: nn.Module, state: Path) -> None:
    """Load a state_dict file into the model.

    Raises:
        UserError: no such file, no state_dict in it, or not this model's.
    """
    if not state.is_file():
        raise UserError(f"no such file, load_state(state={state}), correct the path")
    try:
        model.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(
            f"not a state_dict of this model ({quote_error(error)}), load_state(state={state}), "
            "save model.state_dict() alone"
        ) from error


def check_new(out: Path | None) -> None:
    """Refuse to write over a file.

    Raises:
        UserError: the file is there already.
    """
    if out is not None and out.exists():
        raise UserError(f"the file exists already, save_state(out={out}), choose another name")


def save_state(model: nn.Module, out: Path | None) -> Path:
    """Write the model's state_dict, never over another file.

    Args:
        model: the model.
        out: the file; None is the first free name of mended.pt, mended-2.pt, ….

    Returns:
        The file that was written.

    Raises:
        UserError: the file is there already, or its folder is not.
    """
    check_new(out)
    if out is None:
        names = (Path(f"mended{number}.pt") for number in ("", *(f"-{n}" for n in range(2, 1000))))
        out = next(name for name in names if not name.exists())
    try:
        torch.save(model.state_dict(), out)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot be written ({quote_error(error)}), save_state(out={out}), choose another place"
        ) from error
    return out
