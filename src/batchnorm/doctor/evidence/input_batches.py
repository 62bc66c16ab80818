"""Batches of any form, split into the arguments of the model and the target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError, quote_error
from ...inspect.nests import copied, is_tuple_of_parts, mapped, samples_in, tensors_in

__all__ = ["ENOUGH_SAMPLES", "MOST_BATCHES", "Batch", "as_batch", "collect", "copied", "masks_of", "scaled"]

# 10³ to 10⁴ samples are near-optimal for population statistics (arXiv 2105.07576). An endless generator has to end.
ENOUGH_SAMPLES, ENOUGH_BATCHES, MOST_BATCHES = 10_000, 32, 1_000
_INPUT_NAMES = ("input", "inputs", "x", "image", "images", "data", "features", "pixel_values")


@dataclass
class Batch:
    """One batch. `raw` is what the user gave; `args` and `kwargs` are the arguments of the model."""

    raw: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    size: int

    def call(self, model: nn.Module) -> Any:
        """Call the model on a copy, because a forward that works in place would change the user's data."""
        return model(*copied(self.args), **copied(self.kwargs))

    def shapes(self) -> str:
        found = [str(tuple(t.shape)) for t in tensors_in((self.args, self.kwargs))]
        return ", ".join(found) or "no tensor"


def scaled(batch: Batch, scale: float, shift: float) -> Batch:
    """Return the batch with scale·x + shift for its first tensor of floating-point values."""
    first = next((t for t in tensors_in((batch.args, batch.kwargs)) if t.is_floating_point()), None)

    def change(tensor: Tensor) -> Tensor:
        return tensor * scale + shift if tensor is first else tensor

    return replace(batch, args=mapped(change, batch.args), kwargs=mapped(change, batch.kwargs))


def collect(batches: Any, model: nn.Module) -> list[Batch]:
    """Read the batches once: all of them, or the first ones that are enough for population statistics.

    Raises:
        UserError: no iterable of batches, none in it, fewer than it promises, or an iterable that raises.
    """
    if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise UserError(
            f"batches is a {type(batches).__name__} and no iterable of batches, diagnose(batches=…), "
            "pass a list, a generator or a DataLoader: [batch] for a single one"
        )
    promised = _promised(batches)
    found: list[Batch] = []
    samples = 0
    try:
        for raw in batches:
            found.append(as_batch(raw, model, len(found)))
            samples += found[-1].size
            if len(found) >= MOST_BATCHES or (samples >= ENOUGH_SAMPLES and len(found) >= ENOUGH_BATCHES):
                return found
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"reading the batches raises ({quote_error(error)}), after batch {len(found)}, correct what yields them"
        ) from error
    if not found:
        raise UserError("no batch in batches, diagnose(batches=…), pass a fresh iterable: is the generator spent?")
    if promised is not None and len(found) < promised:
        raise UserError(
            f"the batches end after {len(found)} of the {promised} that len() promises, diagnose(batches=…), "
            "correct what yields them"
        )
    return found


def _promised(batches: Any) -> int | None:
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


def as_batch(raw: Any, model: nn.Module, number: int = 0, *, target: bool = True) -> Batch:
    """Split a batch into the arguments of the model and the target, by the signature of the forward.

    Raises:
        UserError: it is, or holds, no tensor at all.
    """
    if not tensors_in(raw):
        kind = f"a {type(raw).__name__} without tensors"
        raise UserError(
            f"batch {number} is {kind}, diagnose(batches=…), "
            "pass a tensor, a tuple (input, target) or a dict of tensors each"
        )
    if isinstance(raw, Mapping):
        args, kwargs, wanted = _from_mapping(raw, model)
    elif is_tuple_of_parts(raw):
        args, kwargs, wanted = _from_tuple(tuple(raw), model, target)
    else:
        args, kwargs, wanted = (raw,), {}, None
    size = samples_in((args, kwargs))
    return Batch(raw, args, kwargs, wanted, 1 if size is None else size)


def _from_tuple(raw: tuple[Any, ...], model: nn.Module, target: bool) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    required, _ = _parameters(model)
    nested = len(raw) > 1 and isinstance(raw[0], (tuple, list, Mapping))  # ((inputs), target)
    taken = len(raw) if not target else 1 if nested else max(1, min(len(required), len(raw)))
    inputs, others = raw[:taken], raw[taken:]
    wanted = others[0] if len(others) == 1 else (others or None)
    if len(inputs) == 1 and len(required) != 1 and is_tuple_of_parts(inputs[0]):
        return tuple(inputs[0]), {}, wanted
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        args, kwargs, inner = _from_mapping(inputs[0], model)
        return args, kwargs, wanted if wanted is not None else inner
    return inputs, {}, wanted


def _from_mapping(raw: Mapping[str, Any], model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    required, optional = _parameters(model)
    names = [str(key) for key in raw]
    target = next((raw[n] for n in ("labels", "label", "targets", "target", "y") if n in names), None)
    if optional is None or set(names) <= {*required, *optional}:
        accepted = names
    else:
        accepted = [n for n in names if n in required or n in optional]
    if set(required) <= set(accepted) and accepted:
        return (), {n: raw[n] for n in accepted}, target
    if len(required) == 1:
        given = [n for n in _INPUT_NAMES if n in names]
        # The one input has another name than in the forward, or the forward takes the mapping itself.
        return ((raw[given[0]],), {}, target) if given else ((raw,), {}, target)
    return (), dict(raw), target


def _parameters(model: nn.Module) -> tuple[list[str], list[str] | None]:
    """Return the required and the optional parameters of the forward; None for the latter if it takes any keyword."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return [], None
    if isinstance(model, torch.optim.swa_utils.AveragedModel):
        return _parameters(model.module)
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.kind in plain and p.default is p.empty]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return required, None
    return required, [p.name for p in parameters if p.default is not p.empty]


def masks_of(mask: Any) -> Callable[[Batch], Tensor] | None:
    """Return a function batch → mask for a callable or for the name of a key.

    Raises:
        UserError: `mask` is neither, no such key is in a batch, or the result is no tensor.
    """
    if mask is None:
        return None
    if not callable(mask) and not isinstance(mask, str):
        raise UserError(
            f"mask is a {type(mask).__name__}, diagnose(mask=…), pass a callable batch → mask or the name of a key"
        )

    def find(batch: Batch) -> Tensor:
        if callable(mask):
            found = mask(batch.raw)
        elif isinstance(batch.raw, Mapping) and mask in batch.raw:
            found = batch.raw[mask]
        else:
            raise UserError(f"a batch has no key {mask!r}, diagnose(mask={mask!r}), name a key of the batches' dicts")
        if not isinstance(found, Tensor):
            raise UserError(f"the mask is a {type(found).__name__}, diagnose(mask=…), return a bool tensor")
        return found if found.dtype == torch.bool else found != 0

    return find
