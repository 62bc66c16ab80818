"""The passes over the batches: one measures with batch statistics, some run with dropout, two compare statistics.

Together they call the model at most three times for each batch, training steps included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UserError, quote_error
from ...inspect.untouched import preserved
from ...statistics.measured import Measured
from .comparison import Answers, Comparison, compare
from .distance import Distance, distance
from .input_batches import Batch
from .model_graph import Graph
from .normalizations import Layer, model_trains, names_of_tensors
from .observer import Moments, Observer, WrongAxis
from .recorder import Recorder

__all__ = ["SAMPLES_NEEDED", "Measurements", "measure"]

SAMPLES_NEEDED = 1_000
_DROPOUT_BATCHES = 8


@dataclass
class Measurements:
    """What the passes measured. `layers` has the functional ones too; both dicts are by the id of the layer."""

    layers: list[Layer]
    graph: Graph
    measured: dict[int, Measured] = field(default_factory=dict)
    distances: dict[int, Distance] = field(default_factory=dict)
    comparison: Comparison | None = None
    wrong_axis: WrongAxis | None = None
    batches: int = 0
    samples: int = 0


def measure(
    model: nn.Module,
    layers: list[Layer],
    batches: list[Batch],
    *,
    masks: Callable[[Batch], Tensor] | None,
    compare_ways: bool,
    try_dropout: bool,
    spent: int = 0,
) -> Measurements:
    """Run the passes and leave the model as it was. `spent` is the number of forwards that were used before.

    Raises:
        UserError: the forward raises for any other reason than the feature axis.
    """
    passes = _Passes(model, layers, batches, masks)
    with preserved(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for module in model.modules():
            module.training = False
        try:
            passes.run(compare_ways, try_dropout, spent)
        except WrongAxis as found:
            passes.result.wrong_axis = found
    passes.result.layers = passes.observer.layers
    passes.result.measured = passes.observer.measured
    return passes.result


class _Passes:
    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        batches: list[Batch],
        masks: Callable[[Batch], Tensor] | None,
    ) -> None:
        self.model, self.batches, self.masks = model, batches, masks
        self.trains = model_trains(model)
        self.observer = Observer(model, layers)
        self.recorder = Recorder(names_of_tensors(model))
        self.answers = Answers()
        samples = sum(batch.size for batch in batches)
        self.result = Measurements(layers, self.recorder.graph, batches=len(batches), samples=samples)

    def run(self, compare_ways: bool, try_dropout: bool, spent: int) -> None:
        left = 3 * len(self.batches) - spent - len(self.batches)
        self.observer.recorder = self.recorder
        self._first(self.batches[0])
        self.observer.recorder = None
        dropped = 0
        if try_dropout and self._dropout_before_norm():
            dropped = min(len(self.batches), _DROPOUT_BATCHES, left if not compare_ways else max(0, left - 1))
        compared = self._batches_to_compare(compare_ways, left - dropped)
        for number, batch in enumerate(self.batches):
            self.observer.compared = number < dropped
            output = self._forward(batch, number)
            if number < compared:
                self.answers.add(output, batch.target)
        self._with_dropout(dropped)
        self._compare(compared)

    def _first(self, batch: Batch) -> None:
        """Run the first batch under the recorder. It is measured here and not run again."""
        self.observer.compared = True
        self._kept_output = self._run(batch, 0)

    def _forward(self, batch: Batch, number: int) -> object:
        return self._kept_output if number == 0 else self._run(batch, number)

    def _run(self, batch: Batch, number: int) -> object:
        self.observer.mask = self.masks(batch) if self.masks is not None else None
        try:
            return self.observer.forward(lambda: batch.call(self.model))
        except (WrongAxis, UserError):
            raise
        except Exception as error:
            raise UserError(
                f"the forward of {type(self.model).__name__} raises ({quote_error(error)}), batch {number} of shape "
                f"{batch.shapes()}, pass batches as the model takes them"
            ) from error

    def _dropout_before_norm(self) -> bool:
        graph = self.recorder.graph
        return any(node.p > 0 and graph.first_norms_after(node) for node in graph.of_kind("dropout"))

    def _batches_to_compare(self, wanted: bool, left: int) -> int:
        if not wanted or self.result.samples < SAMPLES_NEEDED:
            return 0
        # With one batch, recalibrated statistics are those of the batch. So one pass is enough.
        return min(1, left) if len(self.batches) == 1 else max(0, min(len(self.batches), left // 2))

    def _with_dropout(self, batches: int) -> None:
        self.observer.dropout, self.observer.measuring = True, False
        for number, batch in enumerate(self.batches[:batches]):
            self._run(batch, number)
        self.observer.dropout = False

    def _compare(self, batches: int) -> None:
        """Compare the three statistics, where those of some layer are away."""
        if not self.result.samples >= SAMPLES_NEEDED:
            return
        recalibrated: Moments = {}
        for layer in self.observer.layers:
            seen = self.observer.measured.get(id(layer))
            if seen is None or not seen.pooled.count:
                continue
            recalibrated[id(layer)] = (seen.pooled.mean, seen.pooled.unbiased)
            found = distance(layer, seen, self.trains)
            if found is not None:
                self.result.distances[id(layer)] = found
        if not batches or not any(found.away for found in self.result.distances.values()):
            return
        running = self._answers("running", batches)
        again = self.answers if len(self.batches) == 1 else self._answers(recalibrated, batches)
        judged = sum(batch.size for batch in self.batches[:batches])
        self.result.comparison = compare(self.answers, running, again, judged)

    def _answers(self, statistics: str | Moments, batches: int) -> Answers:
        self.observer.statistics, self.observer.measuring = statistics, False
        answers = Answers()
        for number, batch in enumerate(self.batches[:batches]):
            answers.add(self._run(batch, number), batch.target)
        return answers
