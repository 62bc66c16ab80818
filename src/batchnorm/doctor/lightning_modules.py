"""What a LightningModule says of itself that `diagnose` takes. It is known by its methods, without Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["arguments_of_lightning", "is_lightning"]


def is_lightning(model: nn.Module) -> bool:
    """Return whether the module trains itself as a LightningModule does."""
    return all(callable(getattr(model, name, None)) for name in ("training_step", "configure_optimizers"))


def arguments_of_lightning(model: Any) -> dict[str, Any]:
    """Return the batches, the loader, the optimizer and the step of a LightningModule, as far as it has them."""
    found: dict[str, Any] = {}
    loader = _loader(model, "train_dataloader")
    held_out = _loader(model, "val_dataloader")
    if loader is not None:
        found |= {"loader": loader, "batches": loader}
    elif held_out is not None:
        found["batches"] = held_out
    optimizer = _optimizer(_quietly(model.configure_optimizers))
    if optimizer is not None:
        found["optimizer"] = optimizer
    if optimizer is not None and "batches" in found and getattr(model, "automatic_optimization", True):
        found["step"] = _step(model, optimizer)
    return found


def _quietly(function: Callable[..., Any], *given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns about a missing trainer
        return function(*given)


def _loader(model: Any, name: str) -> Any:
    try:
        loader = _quietly(getattr(model, name))
    except Exception:  # Lightning's own error where the method is not written; or the data set is away
        return None
    return loader[0] if isinstance(loader, (list, tuple)) and loader else loader


def _optimizer(made: Any) -> Optimizer | None:
    if isinstance(made, Mapping):
        return _optimizer(made.get("optimizer"))
    if isinstance(made, (list, tuple)):
        return next((found for found in map(_optimizer, made) if found is not None), None)
    return made if isinstance(made, Optimizer) else None


def _step(model: Any, optimizer: Optimizer) -> Callable[[Any], None]:
    def step(batch: Any) -> None:
        returned = _quietly(model.training_step, batch, 0)
        loss = returned["loss"] if isinstance(returned, Mapping) else returned
        if isinstance(loss, Tensor):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step
