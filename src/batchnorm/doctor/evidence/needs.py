"""Everything that rules look at, gathered once, and what a rule is told where its evidence is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...inspect.graph import GraphNode, ModelGraph
from ...statistics.measured import Measured
from .exported_files import FileEvidence
from .normalizations import Layer
from .passes import Measurements
from .ranks import Ranks, is_distributed
from .training_steps import Training

__all__ = ["CouldNotLook", "Evidence", "NotExamined"]

_BATCHES_NEEDED = 20


class NotExamined(Exception):
    """A rule could not decide. The message says what it lacked."""


class CouldNotLook(NotExamined):
    """A rule could not decide on something that was given, so the examination as a whole is none."""


@dataclass
class Evidence:
    """What was given and what was measured. `model` is None when a file was given; None or empty is missing."""

    model: nn.Module | None = None
    trains: bool = False
    layers: list[Layer] = field(default_factory=list)
    graph: ModelGraph | None = None
    measurements: Measurements | None = None
    real_batches: bool = False  # the batches are data, not an example of their shape
    optimizer: Optimizer | None = None
    loader: Any = None
    masked: bool = False
    steps: int | None = None
    training: Training | None = None
    ranks: Ranks | None = None
    file: FileEvidence | None = None

    def lacks(self, need: str) -> str | None:
        """Return what is missing for a rule that needs `need`; None where nothing is.

        Args:
            need: "file", a key of `_LACKS`, or such a key with " or file".
        """
        if need == "file":
            return None if self.file else "needs an exported program or an ONNX file"
        if self.model is None:
            return None if need.endswith(" or file") else "needs the model, not a file"
        return _LACKS[need.removesuffix(" or file")](self)

    def measured(self, layer: Layer) -> Measured | None:
        """Return what was measured at the layer; None where no forward called it."""
        return self.measurements.measured.get(id(layer)) if self.measurements else None

    def observed(self) -> list[tuple[Layer, Measured]]:
        """Return the layers that a forward called, with what was measured at them."""
        pairs = ((layer, self.measured(layer)) for layer in self.layers)
        return [(layer, seen) for layer, seen in pairs if seen is not None and seen.pooled.count]

    def layer_of(self, node: GraphNode) -> Layer | None:
        """Return the layer behind a normalization's call in the graph: that of its module, or that of its tensors."""
        for layer in self.layers:
            held = [tensor for tensor in (layer.running_mean, layer.weight) if tensor is not None]
            if node.module is not None and layer.module is node.module:
                return layer
            if node.module is None and any(tensor is own for tensor in node.tensors.values() for own in held):
                return layer
        return None

    def evaluates(self, layer: Layer) -> bool:
        """Return whether the model is evaluated and, as far as the batches show, calls the layer."""
        stopped = self.measurements is not None and self.measurements.wrong_axis is not None
        unused = self.measurements is not None and not stopped and self.measured(layer) is None
        return not self.trains and not unused


def _lacks_batch(evidence: Evidence) -> str | None:
    if evidence.measurements is None:
        return "needs at least one batch: pass batches"
    wrong = evidence.measurements.wrong_axis
    return f"the forward stops at {wrong.layer.name}, which gets its features on the wrong axis" if wrong else None


def _lacks_values(evidence: Evidence) -> str | None:
    lacking = _lacks_batch(evidence)
    if lacking or evidence.real_batches:
        return lacking
    return "example_input shows shapes, not the data: pass batches"


def _lacks_count(evidence: Evidence, counted: str, needed: int) -> str | None:
    lacking = _lacks_values(evidence)
    if lacking or evidence.measurements is None:
        return lacking
    given = getattr(evidence.measurements, counted)
    return None if given >= needed else f"needs {needed:,} {counted}, got {given}"


def _lacks_graph(evidence: Evidence) -> str | None:
    wrong = evidence.measurements.wrong_axis if evidence.measurements else None
    if wrong is not None or evidence.graph is None:
        return _lacks_batch(evidence) or "needs the model's graph"
    if evidence.graph.nodes or evidence.model is None or not any(True for _ in evidence.model.children()):
        return None
    return "the forward cannot be traced without a batch: pass batches or example_input"


def _lacks_ranks(evidence: Evidence) -> str | None:
    if evidence.ranks is not None:
        return None
    if is_distributed():
        return "needs process_group (the call is then a collective one, on every rank)"
    return "needs torch.distributed with several ranks, and process_group"


_LACKS: dict[str, Callable[[Evidence], str | None]] = {
    "model": lambda e: None,
    "graph": _lacks_graph,
    "run": lambda e: None if e.measurements else "needs at least one batch: pass batches or example_input",
    "batch": _lacks_batch,
    "values": _lacks_values,
    "batches": lambda e: _lacks_count(e, "batches", _BATCHES_NEEDED),
    "sizes": lambda e: None if e.loader is not None else _lacks_values(e),
    "mask": lambda e: (None if e.masked else "needs mask") or _lacks_values(e),
    "optimizer": lambda e: None if e.optimizer is not None else "needs optimizer",
    "steps": lambda e: None if e.steps is not None else "needs steps, how many training steps are planned",
    "step": lambda e: None if e.training is not None else "needs step and batches",
    "ranks": _lacks_ranks,
}
