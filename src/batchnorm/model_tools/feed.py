"""Batches: how a model is called on one, and a bar that shows how far we are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import UserError
from ..inspect.nests import arguments_of, holds_data, is_tuple_of_parts, moved

__all__ = ["feed", "progress_bar"]


def feed(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch as loaders give it: a mapping is its keyword arguments, of a tuple or list the
    first element is the input, anything else is the input. Tensors are moved to the model's device.

    Raises:
        UserError: there is no tensor and no array in it.
    """
    if is_tuple_of_parts(batch) and batch:
        batch = batch[0]
    if not holds_data(batch):
        raise UserError(
            f"a {type(batch).__name__} without a tensor or array is no batch that can be taken apart; pass "
            "forward=, a function (model, batch) that calls the model"
        )
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    batch = moved(batch, device, "the batch")
    args, kwargs = ((batch,), {}) if is_tuple_of_parts(batch) else arguments_of(batch)
    return model(*args, **kwargs)


@contextmanager
def progress_bar(shown: bool, label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function `step(done, total)`; it draws with rich where `shown`, and does nothing otherwise."""
    if not shown:
        yield lambda done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        raise UserError(
            "progress=True draws with rich, which is not installed; pip install rich, or leave it off"
        ) from None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
