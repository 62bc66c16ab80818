"""Everything the rules look at, gathered once; a rule whose needs were not met is told why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import UserError
from ...statistics.measured import Measured
from .batches import Batch
from .files import FileFacts
from .graph import Graph
from .layers import Layer
from .measure import SAMPLES_NEEDED, Measurements
from .ranks import Ranks
from .training import Training

__all__ = ["BATCHES_NEEDED", "Facts", "NotExamined", "masks_of"]

BATCHES_NEEDED = 20


class NotExamined(Exception):
    """A rule could not decide; the message says what it lacked."""


@dataclass
class Facts:
    """`model` is None when a file was given. What is None or empty was not given or not gathered."""

    model: nn.Module | None = None
    trains: bool = False
    layers: list[Layer] = field(default_factory=list)
    graph: Graph | None = None
    measurements: Measurements | None = None
    real_batches: bool = False  # the batches are data, not an example of their shape
    optimizer: Optimizer | None = None
    loader: Any = None
    masked: bool = False
    steps: int | None = None
    training: Training | None = None
    ranks: Ranks | None = None
    file: FileFacts | None = None

    def lacks(self, need: str) -> str | None:
        """Returns what is missing for a rule that needs `need`, or None."""
        if need == "file":
            return None if self.file else "needs an exported program or an ONNX file"
        if self.model is None:
            return "needs the model, not a file"
        return _LACKS[need](self)

    def measured(self, layer: Layer) -> Measured | None:
        """What was measured at the layer; None where no forward called it."""
        return self.measurements.of(layer) if self.measurements else None

    def observed(self) -> list[tuple[Layer, Measured]]:
        """The layers that a forward called, with what was measured at them."""
        pairs = ((layer, self.measured(layer)) for layer in self.layers)
        return [(layer, seen) for layer, seen in pairs if seen is not None and seen.pooled.count]

    def evaluates(self, layer: Layer) -> bool:
        """Whether the model is being evaluated, and the layer has a part in it as far as is known."""
        stopped = self.measurements is not None and self.measurements.wrong_axis is not None
        unused = self.measurements is not None and not stopped and self.measured(layer) is None
        return not self.trains and not unused


def _lacks_batch(facts: Facts) -> str | None:
    if facts.measurements is None:
        return "needs at least one batch: pass batches"
    wrong = facts.measurements.wrong_axis
    return f"the forward stops at {wrong.layer.name}, which gets its features on the wrong axis" if wrong else None


def _lacks_values(facts: Facts) -> str | None:
    lacking = _lacks_batch(facts)
    if lacking or facts.real_batches:
        return lacking
    return "example_input shows shapes, not the data: pass batches"


def _lacks_batches(facts: Facts) -> str | None:
    lacking = _lacks_values(facts)
    if lacking or facts.measurements is None or facts.measurements.batches >= BATCHES_NEEDED:
        return lacking
    return f"needs {BATCHES_NEEDED} batches, got {facts.measurements.batches}"


def _lacks_samples(facts: Facts) -> str | None:
    lacking = _lacks_values(facts)
    if lacking or facts.measurements is None or facts.measurements.samples >= SAMPLES_NEEDED:
        return lacking
    return f"needs {SAMPLES_NEEDED:,} samples, got {facts.measurements.samples}"


def _lacks_graph(facts: Facts) -> str | None:
    wrong = facts.measurements.wrong_axis if facts.measurements else None
    if wrong is not None or facts.graph is None:
        return _lacks_batch(facts) or "needs the model's graph"
    if facts.graph.complete or facts.graph.nodes:
        return None
    return "the forward cannot be traced without a batch: pass batches or example_input"


def _lacks_ranks(facts: Facts) -> str | None:
    if facts.ranks is not None:
        return None
    if dist.is_available() and dist.is_initialized():
        return "needs process_group (the call is then a collective one, on every rank)"
    return "needs torch.distributed with several ranks, and process_group"


_LACKS: dict[str, Callable[[Facts], str | None]] = {
    "model": lambda facts: None,
    "graph": _lacks_graph,
    "run": lambda facts: None if facts.measurements else "needs at least one batch: pass batches or example_input",
    "batch": _lacks_batch,
    "values": _lacks_values,
    "batches": _lacks_batches,
    "samples": _lacks_samples,
    "sizes": lambda facts: None if facts.loader is not None else _lacks_values(facts),
    "mask": lambda facts: (None if facts.masked else "needs mask") or _lacks_values(facts),
    "optimizer": lambda facts: None if facts.optimizer is not None else "needs optimizer",
    "steps": lambda facts: None if facts.steps is not None else "needs steps, how many training steps are planned",
    "step": lambda facts: None if facts.training is not None else "needs step and batches",
    "ranks": _lacks_ranks,
}


def masks_of(mask: Any) -> Callable[[Batch], Tensor] | None:
    """Returns batch → mask for a callable or for the name of a batch's key."""
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
