"""From names to what is examined: models, factories, files, data, steps; and the file of a repaired state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, quote_error
from ..factories import find_factory
from .evidence.exported_files import FILE_TYPES
from .evidence.input_batches import ENOUGH_SAMPLES
from .lightning_modules import arguments_of_lightning, is_lightning

__all__ = [
    "Subject",
    "changed_tensors",
    "check_new",
    "copied_state",
    "find_function",
    "make_optimizer",
    "make_step",
    "read_data",
    "save_state",
    "subject",
]


@dataclass
class Subject:
    """What a name stands for: the model or a file's path, and whatever else of `diagnose`'s arguments came with it.

    `factory` is the function that made it, whose source a patch can change.
    """

    model: nn.Module | Path
    arguments: dict[str, Any] = field(default_factory=dict)
    factory: Callable[..., Any] | None = None


_ARGUMENTS = ("batches", "example_input", "optimizer", "loader", "mask", "steps", "step", "process_group", "metric")


def subject(target: str) -> Subject:
    """Return what a name stands for.

    Args:
        target: ``pkg.mod:name`` or ``path/file.py:name`` of a model, or of a function (a class) that makes a model,
            (model, batches), a dict of what `diagnose` takes, or a LightningModule; or the path of an .onnx or .pt2
            file or of a checkpoint.

    Raises:
        UserError: no such thing; the factory raises, or returns something else.
    """
    if Path(target).suffix.lower() in FILE_TYPES:
        return Subject(Path(target))
    if ":" not in target:
        raise UserError(
            f"neither pkg.mod:function nor an .onnx or .pt2 file nor a checkpoint, {target}, name a function or a file"
        )
    factory = find_factory(target, "subject(target=…)", "a torch.nn.Module")
    made = factory if isinstance(factory, nn.Module) else _call(factory, target, "subject(target=…)")
    arguments = _arguments_of(made, target)
    model = arguments.pop("model")
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the function returns {type(model).__name__}, {target}, return a torch.nn.Module, (model, batches) or a "
            "dict of what diagnose takes"
        )
    if is_lightning(model):
        arguments = {**arguments_of_lightning(model), **arguments}
    return Subject(model, arguments, None if factory is made else factory)


def _arguments_of(made: Any, target: str) -> dict[str, Any]:
    if isinstance(made, tuple) and len(made) == 2:
        return {"model": made[0], "batches": made[1]}
    if not isinstance(made, Mapping):
        return {"model": made}
    unknown = [key for key in made if key not in ("model", *_ARGUMENTS)]
    if unknown or "model" not in made:
        what = f"an unknown key {unknown[0]!r}" if unknown else "no key 'model'"
        raise UserError(f"the dict has {what}, {target}, its keys are model, {', '.join(_ARGUMENTS)}")
    return dict(made)


def _call(function: Callable[..., Any], name: str, parameter: str, *given: Any) -> Any:
    try:
        return function(*given)
    except Exception as error:
        raise UserError(f"the function raises ({quote_error(error)}), {parameter} {name}, correct it") from error


def make_optimizer(optimizer: str, model: nn.Module) -> Any:
    """Return the optimizer that ``pkg.mod:function`` makes from the model, or one of `torch.optim` by its name.

    Raises:
        UserError: no such name, or the function raises.
    """
    known = getattr(torch.optim, optimizer, None)
    if isinstance(known, type) and issubclass(known, torch.optim.Optimizer):
        return _call(known, optimizer, "diagnose(optimizer=…)", model.parameters())
    names = ("SGD", "Adam", "AdamW")
    factory = find_factory(optimizer, "diagnose(optimizer=…)", "a torch.optim.Optimizer", names)
    return _call(factory, optimizer, "diagnose(optimizer=…)", model)


def make_step(step: str, model: nn.Module, optimizer: Any) -> Callable[[Any], Any]:
    """Return the training step of a name: a function of (batch), (model, batch) or (model, optimizer, batch).

    Raises:
        UserError: no such function, another number of parameters, or no optimizer where it takes one.
    """
    function = find_factory(step, "diagnose(step=…)", "nothing and trains on one batch")
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if len(needed) == 3 and optimizer is None:
        raise UserError(f"the step takes an optimizer, diagnose(step=…) {step}, name one with --optimizer")
    given: dict[int, tuple[Any, ...]] = {1: (), 2: (model,), 3: (model, optimizer)}
    if len(needed) not in given:
        raise UserError(
            f"the step takes {len(needed)} parameters, diagnose(step=…) {step}, "
            "write it of (batch), (model, batch) or (model, optimizer, batch)"
        )
    return functools.partial(function, *given[len(needed)])


def find_function(name: str | None, parameter: str, returns: str) -> Any:
    """Return the function of a name ``pkg.mod:function``; any other text, or None, is returned as it is.

    Raises:
        UserError: no such function.
    """
    return find_factory(name, parameter, returns) if name is not None and ":" in name else name


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
        made: Iterable[Any] = _call(find_factory(data, "read_data(data=…)", "the data"), data, "read_data(data=…)")
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


def check_new(out: Path | None) -> None:
    """Refuse to write over a file.

    Raises:
        UserError: the file is there already.
    """
    if out is not None and out.exists():
        raise UserError(f"the file exists already, save_state(out={out}), choose another name")


def copied_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the model's tensors by name."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}


def changed_tensors(before: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Return the names of the tensors that are new or hold other values than before."""

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))

    state = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    return [name for name, value in state.items() if name not in before or not same(before[name], value)]


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
