"""Checkpoints as people have them: plain, in a dict, of Lightning, of a wrapper, averaged, safetensors."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, quote_error

__all__ = ["CHECKPOINT_TYPES", "load_state", "read_state"]

CHECKPOINT_TYPES = (".pt", ".pth", ".ckpt", ".safetensors")
# Where a training keeps the model's state, the likeliest first; averaged weights only where there are no others.
_KEYS = (
    "state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "ema",
    "state_dict_ema", "ema_state_dict", "model_ema", "params_ema", "shadow",
)  # fmt: skip
# What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "_forward_module.", "ema_model.", "ema.")


def read_state(path: Path, parameter: str = "load_state(state={})") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name. Nothing in the file is run: pickled objects are refused.

    Args:
        path: the file.
        parameter: to what it was given, for the messages.

    Raises:
        UserError: no such file, damaged, pickled objects in it, or no tensors.
    """
    where = parameter.format(path)
    if not path.is_file():
        raise UserError(f"no such file, {where}, correct the path")
    try:
        content = _read(path)
    except pickle.UnpicklingError as error:
        pickled = "global" in str(error).lower()  # torch names the class that it would have to import
        what = "it holds pickled objects, which could run code" if pickled else "damaged, or no checkpoint"
        raise UserError(f"{what}, {where}, save model.state_dict() alone") from error
    except ModuleNotFoundError as error:
        raise UserError(f"safetensors is not installed, {where}, install it with pip install safetensors") from error
    except Exception as error:
        raise UserError(f"not a checkpoint ({quote_error(error, 120)}), {where}, save model.state_dict()") from error
    state = _state_in(content)
    if not state:
        raise UserError(f"no state_dict in it, {where}, save model.state_dict(), alone or under the key 'model'")
    return state


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _state_in(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if any("." in key or key in ("weight", "running_mean") for key in tensors):
        return tensors
    inner = (_state_in(content[key]) for key in _KEYS if key in content)
    return next((state for state in inner if state), tensors)


def load_state(model: nn.Module, state: Path) -> None:
    """Load a checkpoint into the model.

    Raises:
        UserError: it cannot be read, or it is not this model's; the model is then unchanged.
    """
    tensors = read_state(state)
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    named = _renamed(tensors, own)
    wrong = [name for name in named if name in own and named[name].shape != own[name]]
    missing = [name for name in own if name not in named and not name.endswith("num_batches_tracked")]
    extra = [name for name in named if name not in own]
    for names, what in ((missing, "lacks"), (extra, "has besides"), (wrong, "has in another shape")):
        if names:
            raise UserError(
                f"not a state_dict of this model: it {what} {len(names)} names such as {names[0]}, "
                f"load_state(state={state}), give the checkpoint of this model"
            )
    try:
        model.load_state_dict(named, strict=False)
    except Exception as error:
        raise UserError(
            f"not a state_dict of this model ({quote_error(error)}), load_state(state={state}), "
            "save model.state_dict() alone"
        ) from error


def _renamed(tensors: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Take off the prefixes that wrappers put before names, and what an averaging counts, as far as names fit then."""
    own = set(own)
    best = dict(tensors)
    waiting = [best]
    for _ in range(3):
        waiting = [
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            for state in waiting
            for prefix in _PREFIXES
            if any(name.startswith(prefix) for name in state)
        ]
        for state in waiting:
            if len(own & state.keys()) > len(own & best.keys()):
                best = state
    return best
