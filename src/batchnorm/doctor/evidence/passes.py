"""The passes over the batches: one measures with batch statistics, some run with dropout, two compare statistics.

Together they call the model at most three times for each batch, training steps included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UserError, quote_error
from ...inspect.from_run import graph_of_run
from ...inspect.graph import ModelGraph
from ...inspect.operators import Effect
from ...inspect.reading import decided
from ...inspect.untouched import preserved
from ...statistics.measured import Measured
from .comparison import Answers, Comparison, compare
from .distance import Distance, distance
from .input_batches import Batch
from .normalizations import Layer, model_trains
from .observer import Moments, Observer, WrongAxis

__all__ = ["SAMPLES_NEEDED", "Measurements", "measure"]

SAMPLES_NEEDED = 1_000
_DROPOUT_BATCHES = 8


@dataclass
class Measurements:
    """What the passes measured. `layers` has the functional ones too; both dicts are by the id of the layer."""

    layers: list[Layer]
    graph: ModelGraph | None = None
    measured: dict[int, Measured] = field(default_factory=dict)
    distances: dict[int, Distance] = field(default_factory=dict)
    comparison: Comparison | None = None
    freed: Comparison | None = None  # as if the frozen layers were not
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
        self.answers: list[Answers] = []  # of each batch, with its own statistics
        samples = sum(batch.size for batch in batches)
        self.result = Measurements(layers, batches=len(batches), samples=samples)

    def run(self, compare_ways: bool, try_dropout: bool, spent: int) -> None:
        left = 3 * len(self.batches) - spent - len(self.batches) - 1  # one for the graph
        self._first(self.batches[0])
        dropped = 0
        if try_dropout and self._dropout_before_norm():
            dropped = min(len(self.batches), _DROPOUT_BATCHES, left if not compare_ways else max(0, left - 1))
        for number, batch in enumerate(self.batches):
            self.observer.compared = number < dropped
            self.answers.append(Answers())
            self.answers[-1].add(self._forward(batch, number), batch.target)
        self._with_dropout(dropped)
        if self.result.samples >= SAMPLES_NEEDED:
            self._compare(left - dropped if compare_ways else 0)

    def _first(self, batch: Batch) -> None:
        """Run the first batch. It is measured here, and run again only for the graph."""
        self.observer.compared = True
        self._kept_output = self._run(batch, 0)
        example = batch.kwargs or batch.args
        self.result.graph = decided(graph_of_run(self.model, example, "diagnose"), self.model, example)

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
        assert self.result.graph is not None
        return any(node.p > 0 and node.first_norms() for node in self.result.graph.of_effect(Effect.DROPOUT))

    def _with_dropout(self, batches: int) -> None:
        self.observer.dropout, self.observer.measuring = True, False
        for number, batch in enumerate(self.batches[:batches]):
            self._run(batch, number)
        self.observer.dropout = False

    def _compare(self, left: int) -> None:
        """Compare the three statistics, where those of some layer are away; and once more for frozen layers, as if they
        were not frozen, because only the answers tell whether they should be."""
        population = self._population()
        for layer in self.observer.layers:
            found = distance(layer, self.observer.measured[id(layer)], self.trains) if id(layer) in population else None
            if found is not None:
                self.result.distances[id(layer)] = found
        away = [layer for layer in self.observer.layers if self._away(layer)]
        ways = [frozen for frozen in (False, True) if any(layer.frozen == frozen for layer in away)]
        # With one batch, recalibrated statistics are those of the batch. So one pass a comparison is enough.
        needed = len(ways) * (1 if len(self.batches) == 1 else 2)
        batches = min(len(self.batches), left // needed) if needed and left > 0 else 0
        held = Answers.pooled(self.answers[:batches])
        if batches and False in ways:
            running = self._answers("running", batches)
            again = held if len(self.batches) == 1 else self._answers(population, batches)
            self.result.comparison = self._compared(held, running, again, batches)
            held = again
        if batches and True in ways:
            self._compare_freed(held, batches)

    def _compare_freed(self, held: Answers, batches: int) -> None:
        measured, self.observer.measured, self.observer.freed = self.observer.measured, {}, True
        free = self._answers("batch", batches, measuring=True)
        again = free if len(self.batches) == 1 else self._answers(self._population(), batches)
        self.result.freed = self._compared(free, held, again, batches)
        self.observer.measured, self.observer.freed = measured, False

    def _compared(self, batch: Answers, running: Answers, again: Answers, batches: int) -> Comparison | None:
        return compare(batch, running, again, sum(one.size for one in self.batches[:batches]))

    def _population(self) -> Moments:
        """The moments of everything that each layer was given."""
        seen = self.observer.measured.items()
        return {key: (one.pooled.mean, one.pooled.unbiased) for key, one in seen if one.pooled.count}

    def _away(self, layer: Layer) -> bool:
        found = self.result.distances.get(id(layer))
        return found is not None and found.away > 0

    def _answers(self, statistics: str | Moments, batches: int, measuring: bool = False) -> Answers:
        self.observer.statistics, self.observer.measuring = statistics, measuring
        answers = Answers()
        for number, batch in enumerate(self.batches[:batches]):
            answers.add(self._run(batch, number), batch.target)
        return answers
