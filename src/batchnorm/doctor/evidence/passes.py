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
from ...statistics.pool import Pool
from .answers import Answers, Metric
from .comparison import Comparison, compare
from .distance import Distance, distance
from .input_batches import Batch, scaled
from .input_shift import InputShift, find_input_shift
from .normalizations import Layer, model_trains
from .observer import Moments, Observer, Reached, WrongAxis

__all__ = ["Measurements", "measure"]

_DROPOUT_BATCHES = 8
# Samples on which the effect of the input's scale and shift is measured.
_SHIFT_SAMPLES = 256
# Root mean square of the means, in standard deviations, from which they show a scale of the input.
_MEANS = 0.5
# Share of channels from which a layer counts as away.
_AWAY = 0.1


@dataclass
class Measurements:
    """What the passes measured. `layers` has the functional ones too; the dicts are by the id of the layer.

    Attributes:
        symptom: how good the whole model's answers are with each kind of statistics, frozen layers like all others.
        comparison: the same, but frozen layers keep their running statistics.
        distances: by the mode that the model is in.
        if_evaluated: as if it were in evaluation mode, and every layer, frozen or not, took the batches' statistics.
        input_shift: how the network's input differs from that of the running statistics, if that explains them.
    """

    layers: list[Layer]
    graph: ModelGraph | None = None
    measured: dict[int, Measured] = field(default_factory=dict)
    distances: dict[int, Distance] = field(default_factory=dict)
    if_evaluated: dict[int, Distance] = field(default_factory=dict)
    symptom: Comparison | None = None
    comparison: Comparison | None = None
    input_shift: InputShift | None = None
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
    metric: Metric | None = None,
) -> Measurements:
    """Run the passes and leave the model as it was. `spent` is the number of forwards that were used before.

    Raises:
        UserError: the forward raises for any other reason than the feature axis.
    """
    passes = _Passes(model, layers, batches, masks, metric)
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


def _without_means(layer: Layer, seen: Measured) -> bool:
    """Running means and those of the batches are about 0. So only a scale shows, in one number a channel, which proves
    nothing."""
    assert layer.running_mean is not None
    mean, var = layer.running_mean.double(), seen.pooled.var + layer.eps
    largest = torch.maximum(mean.square().to(var.device) / var, seen.pooled.mean.square() / var)
    return float(largest.mean()) < _MEANS**2


class _Passes:
    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        batches: list[Batch],
        masks: Callable[[Batch], Tensor] | None,
        metric: Metric | None,
    ) -> None:
        self.model, self.batches, self.masks, self.metric = model, batches, masks, metric
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
            dropped = min(len(self.batches), _DROPOUT_BATCHES, left if not compare_ways else max(0, left - 2))
        for number, batch in enumerate(self.batches):
            self.observer.compared = number < dropped
            self.answers.append(Answers(self.metric))
            self.answers[-1].add(self._forward(batch, number), batch.target)
        self._with_dropout(dropped)
        self._measure_distances()
        if compare_ways:
            self._compare(left - dropped)
            self._look_at_input()

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

    def _measure_distances(self) -> None:
        self.result.distances = self._distances(self.trains)
        self.result.if_evaluated = self._distances(False)

    def _distances(self, trains: bool) -> dict[int, Distance]:
        measured = self.observer.measured
        called = [layer for layer in self.observer.layers if id(layer) in measured and measured[id(layer)].pooled.count]
        found = {id(layer): distance(layer, measured[id(layer)], trains) for layer in called}
        return {key: value for key, value in found.items() if value is not None}

    def _compare(self, left: int) -> None:
        """Compare the statistics on as many batches as there are forwards left for, at least one.

        Where some layers are frozen, the first pass had these at their running statistics. A pass without them frozen
        follows, because held statistics may be the fault.
        """
        called = [layer for layer in self.observer.layers if id(layer) in self.observer.measured and layer.tracks]
        frozen, live = (any(layer.frozen == kind for layer in called) for kind in (True, False))
        if not called:
            return
        # With one batch, recalibrated statistics are those of the batch, which needs no pass.
        passes = (1 + live) if frozen else 1
        passes += 0 if len(self.batches) == 1 else (frozen + live)
        batches = max(1, min(len(self.batches), left // passes))
        held = Answers.pooled(self.answers[:batches])
        running = self._answers("running", batches) if live else held
        if live:
            again = self._recalibrated(held, batches)
            self.result.comparison = self.result.symptom = self._compared(held, running, again, batches)
        if frozen:
            self._compare_freed(running, batches)

    def _compare_freed(self, running: Answers, batches: int) -> None:
        measured, self.observer.measured, self.observer.freed = self.observer.measured, {}, True
        free = self._answers("batch", batches, measuring=True)
        self.result.symptom = self._compared(free, running, self._recalibrated(free, batches), batches)
        self.result.if_evaluated = self._distances(False)
        self.observer.measured, self.observer.freed = measured, False

    def _look_at_input(self) -> None:
        """Look at the input where the first layer that runs is away from its statistics and most later ones are not.

        With batch statistics the first layer takes a shift of its input out again, so later ones see what they knew.
        """
        away = {key: d.away >= _AWAY for key, d in self.result.if_evaluated.items()}
        by_id = {id(layer): layer for layer in self.observer.layers}
        called = [by_id[key] for key in self.observer.measured if key in by_id and by_id[key].tracks]
        if not called or not away.get(id(called[0])) or self.result.if_evaluated[id(called[0])].young:
            return
        later = [away.get(id(layer), False) for layer in called[1:]]
        alone = not later and _without_means(called[0], self.observer.measured[id(called[0])])
        held = any(getattr(layer.module, "track_running_stats", True) is False for layer in called)
        if called[0].is_initial or held or sum(later) > len(later) / 3 or alone:
            return
        self.result.input_shift = find_input_shift(called[0], lambda u, v: self._response(called[0], u, v))

    def _response(self, layer: Layer, scale: float, shift: float) -> tuple[Tensor, Tensor]:
        """The moments of the layer's input where the network's input is scale·x + shift."""
        pool = Pool()
        self.observer.stop_at, self.observer.measuring, self.observer.mask = layer, False, None
        needed = -(-_SHIFT_SAMPLES // max(1, self.batches[0].size))
        for batch in self.batches[:needed]:
            changed = scaled(batch, scale, shift)
            try:
                self.observer.forward(lambda changed=changed: changed.call(self.model))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            except Reached as reached:
                pool.add(*reached.moments)
        self.observer.stop_at = None
        return pool.mean, pool.var

    def _recalibrated(self, by_batch: Answers, batches: int) -> Answers:
        return by_batch if len(self.batches) == 1 else self._answers(self._population(), batches)

    def _compared(self, batch: Answers, running: Answers, again: Answers, batches: int) -> Comparison | None:
        return compare(batch, running, again, sum(one.size for one in self.batches[:batches]))

    def _population(self) -> Moments:
        """The moments of everything that each layer was given."""
        seen = self.observer.measured.items()
        return {key: (one.pooled.mean, one.pooled.unbiased) for key, one in seen if one.pooled.count}

    def _answers(self, statistics: str | Moments, batches: int, measuring: bool = False) -> Answers:
        self.observer.statistics, self.observer.measuring = statistics, measuring
        answers = Answers(self.metric)
        for number, batch in enumerate(self.batches[:batches]):
            answers.add(self._run(batch, number), batch.target)
        return answers
