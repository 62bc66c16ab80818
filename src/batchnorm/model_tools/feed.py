"""Batches: how a model is called on one, how many samples are in it, and a bar that shows how far we are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UserError

__all__ = ["feed", "progress_bar", "samples_in"]


def feed(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch as loaders give it: a mapping is its keyword arguments, of a tuple or list the
    first element is the input, anything else is the input. Tensors are moved to the model's device."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    batch = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def samples_in(batch: Any) -> int:
    """The length of the first tensor's first axis; 1 where there is none."""
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    return 1 if first is None or first.dim() == 0 else int(first.shape[0])


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
