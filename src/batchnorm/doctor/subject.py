"""From names on the command line to what is examined: factories, files, data, state files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, quote_error
from .facts.batches import ENOUGH_SAMPLES

__all__ = ["load_state", "read_data", "save_state", "subject"]


def subject(name: str) -> tuple[nn.Module | Path, Iterable[Any] | None]:
    """Returns the model that ``pkg.mod:function`` makes and its batches if it has some, or the path of a file.

    Raises:
        UserError: no such thing; the factory raises, or returns something else.
    """
    if Path(name).suffix.lower() in (".onnx", ".pt2"):
        return Path(name), None
    if ":" not in name:
        raise UserError(f"neither pkg.mod:function nor an .onnx or .pt2 file, {name}, name a function or a file")
    made = _call(name, "doctor")
    model, batches = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the function returns {type(model).__name__}, {name}, return a torch.nn.Module or (model, batches)"
        )
    return model, batches


def _call(name: str, option: str) -> Any:
    from ..factories import find_factory

    function = find_factory(name, option)
    try:
        return function()
    except Exception as error:
        raise UserError(f"the function raises ({quote_error(error)}), {option} {name}, correct it") from error


def read_data(source: str, batch_size: int) -> Iterable[Any]:
    """Returns batches (input, label) of a data source of the study's kinds, as stored and in random order, or what
    ``pkg.mod:function`` returns. Of a source too large to be held, as many samples as are looked at.

    Raises:
        UserError: the source cannot be read.
    """
    if ":" in source and not source.startswith("openml:") and not Path(source).exists():
        made: Iterable[Any] = _call(source, "--data")
        return made
    import numpy as np

    from ..experiment.data import Samples
    from ..experiment.readers import find

    samples = find(source)
    if not isinstance(samples, Samples):  # too large to be held, and more than is needed
        from ..experiment.streams.order import some_of

        samples = some_of(samples, ENOUGH_SAMPLES + batch_size, 0)
    labels = np.unique(samples.y, return_inverse=True)[1]
    x = torch.from_numpy(np.ascontiguousarray(samples.x)).float()
    y = torch.from_numpy(labels.reshape(-1)).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    # Without the leftover, which would be ours and not the user's.
    whole = order[: max(len(order) - len(order) % batch_size, min(batch_size, len(order)))]
    return [(x[chosen], y[chosen]) for chosen in whole.split(batch_size)]


def load_state(model: nn.Module, path: Path) -> None:
    """Loads a state_dict file into the model.

    Raises:
        UserError: no such file, no state_dict in it, or not this model's.
    """
    if not path.is_file():
        raise UserError(f"no such file, --state {path}, correct the path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:
        raise UserError(
            f"not a state_dict of this model ({quote_error(error)}), --state {path}, save model.state_dict() alone"
        ) from error


def save_state(model: nn.Module, path: Path | None) -> Path:
    """Writes the model's state_dict; never over another file.

    Raises:
        UserError: the file is there already, or its folder is not.
    """
    if path is None:
        names = (Path(f"mended{number}.pt") for number in ("", *(f"-{n}" for n in range(2, 1000))))
        path = next(name for name in names if not name.exists())
    elif path.exists():
        raise UserError(f"the file exists already, --out {path}, choose another name")
    try:
        torch.save(model.state_dict(), path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot be written ({quote_error(error)}), --out {path}, choose another place") from error
    return path
