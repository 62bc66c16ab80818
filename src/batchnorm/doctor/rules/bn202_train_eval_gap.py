from __future__ import annotations

from collections.abc import Iterator

from ..change import request_recalibration
from ..evidence.comparison import Comparison
from ..evidence.distance import Distance
from ..evidence.needs import CouldNotLook, Evidence
from ..evidence.passes import Measurements
from ..rule import Found, rule

# Share of channels from which a layer counts as away. One odd channel in a hundred proves nothing.
_SHARE = 0.1
# Smallest change of the answers that is a gap, and a large one, in standard deviations of the answers.
_EFFECT, _LARGE_EFFECT = 0.1, 0.5
_RECOVERED = 0.5
# Batches after which less than 1 % of an initial value is left with torch's momentum of 0.1.
_SETTLED = 44
_OF_FROZEN = "batchnorm.recalibrate(model, batches, frozen=True)"
_OF_BATCHES = "compare how batches are drawn in training and evaluation: the answers depend on who shares a batch"


@rule(
    "BN202",
    "train-eval-gap",
    summary="The running statistics are away from the population's, and evaluation pays for it.",
    order=40,
    needs=("values",),
    wants=("comparison",),
    fix="batchnorm.recalibrate(model, batches)",
    false_alarm="the batches given are not drawn as the training data were",
    repair=request_recalibration,
)
def train_eval_gap(evidence: Evidence) -> Iterator[Found]:
    measurements = evidence.measurements
    assert measurements is not None
    symptom = measurements.symptom
    tracked = [layer for layer, _ in evidence.observed() if layer.tracks]
    if not tracked or measurements.input_shift is not None:  # the data are at fault, and recalibration would hide it
        return
    found = [*_live(evidence, measurements), *_frozen(evidence, measurements)]
    if not found and symptom is not None and symptom.fails:
        _refuse_young(evidence, symptom, measurements)
        found = list(_failing(evidence, symptom, measurements.if_evaluated))
    yield from found
    if not found:
        _refuse_undecided(symptom, evidence.trains and all(layer.is_initial for layer in tracked))


def _refuse_young(evidence: Evidence, symptom: Comparison, measurements: Measurements) -> None:
    """A training that has only begun has a gap that goes away by itself. Whether it does, nobody can tell yet.

    Initial statistics are those of a new network, unless it answers well with the batches' statistics.
    """
    found = [(layer, measurements.if_evaluated.get(id(layer))) for layer in evidence.layers]
    live = measurements.comparison is not None and measurements.comparison.fails
    away = [layer for layer, d in found if d is not None and d.away >= _SHARE and not (live and layer.frozen)]
    young = {key for key, d in measurements.distances.items() if d.young}
    learned = symptom.gap > 0.5 * (1 - symptom.running if symptom.scale == "accuracy" else 1)
    begun = [
        (id(layer) in young and steps < _SETTLED) or (layer.is_initial and not steps and not learned)
        for layer in away
        for steps in (0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked),)
    ]
    if evidence.trains and away and all(begun):
        raise CouldNotLook(
            f"evaluation would lose {symptom.gap:.2g} in {symptom.scale} now, but the statistics are those of a few "
            "steps: train on, and examine the model again"
        )


def _refuse_undecided(symptom: Comparison | None, new: bool) -> None:
    """Say so where the batches that were given do not tell whether evaluation suffers."""
    if symptom is None:
        raise CouldNotLook("the model's answers hold nothing that can be compared: no tensor of floating-point values")
    if symptom.undecided:
        raise CouldNotLook(
            f"{symptom.samples} samples do not tell a gap of ten points from chance "
            f"(99 % interval {symptom.low:.2f} to {symptom.high:.2f}): pass more"
        )
    if symptom.apart and not new:
        raise CouldNotLook(
            f"running statistics change the answers by {symptom.effect:.2g} standard deviations: pass targets, to tell "
            "whether it costs anything"
        )


def _live(evidence: Evidence, measurements: Measurements) -> Iterator[Found]:
    comparison = measurements.comparison
    for layer in evidence.layers:
        d = measurements.distances.get(id(layer))
        severity = _severity(d, comparison) if d is not None and not layer.frozen else None
        if d is not None and severity is not None:
            yield Found(layer.name, _message(d, comparison), _evidence(d, comparison), severity)


def _frozen(evidence: Evidence, measurements: Measurements) -> Iterator[Found]:
    """Layers that are held at statistics which are not these batches', which may be meant: the targets decide."""
    symptom = measurements.symptom
    if symptom is None or not symptom.costs or symptom.effect <= _EFFECT or symptom.recovered < _RECOVERED:
        return
    live = measurements.comparison
    # In training the weights may have learned with them, and live layers may explain the gap.
    if evidence.trains and (not symptom.fails or (live is not None and live.fails)):
        return
    for layer in (layer for layer in evidence.layers if layer.frozen):
        # Where the layers before it are frozen, and where they are not
        found = [table.get(id(layer)) for table in (measurements.distances, measurements.if_evaluated)]
        d = next((d for d in found if d is not None and d.away >= _SHARE), None)
        if d is not None:
            yield Found(
                layer.name, f"it is frozen, and {_message(d, symptom)}", _evidence(d, symptom), "error", _OF_FROZEN
            )


def _failing(evidence: Evidence, symptom: Comparison, distances: dict[int, Distance]) -> Iterator[Found]:
    """A gap of ten points, whatever the reason: at the layers that are away, else of the whole model."""
    severity = "error" if symptom.recovered >= _RECOVERED else "warning"
    away = [(layer, distances[id(layer)]) for layer in evidence.layers if id(layer) in distances]
    away = [(layer, d) for layer, d in away if d.away >= _SHARE]
    for layer, d in away:
        yield Found(layer.name, _message(d, symptom), _evidence(d, symptom), severity)
    if not away:
        back = f"recalibration recovers {max(0.0, min(1.0, symptom.recovered)):.0%} of it"
        numbers: dict[str, float | int | str] = {"gap": symptom.gap, "low": symptom.low, "high": symptom.high}
        advice = None if symptom.recovered >= _RECOVERED else _OF_BATCHES
        yield Found(
            "",
            f"running statistics answer worse than the batches' by {symptom.gap:.2g} in {symptom.scale}; {back}",
            numbers | {"samples": symptom.samples},
            severity,
            advice,
        )


def _severity(d: Distance, comparison: Comparison | None) -> str | None:
    fails = d.failing >= _SHARE
    if comparison is None:
        return "warning" if fails else None
    felt = comparison.effect > _EFFECT
    costly = comparison.costs or (not comparison.judged and comparison.effect > _LARGE_EFFECT)
    if felt and comparison.recovered >= _RECOVERED and (fails or (d.away >= _SHARE and costly and not d.young)):
        return "error"
    # A smaller distance is a warning if the answers change and, where targets can tell, if it costs something.
    worth_it = felt and (costly if comparison.judged or d.young else True)
    return "warning" if fails or (worth_it and (d.failing or d.away >= _SHARE)) else None


def _message(d: Distance, comparison: Comparison | None) -> str:
    text = f"{d.away:.0%} of its channels have running statistics away from the population's"
    if comparison is None:
        return text
    if comparison.recovered >= _RECOVERED:
        return f"{text}; recalibration recovers {min(1.0, comparison.recovered):.0%} of the gap in {comparison.scale}"
    return f"{text}; but recalibration does not recover the gap in {comparison.scale}"


def _evidence(d: Distance, comparison: Comparison | None) -> dict[str, float | int | str]:
    evidence: dict[str, float | int | str] = {
        "mean_shift": d.mean_shift,
        "log2_variance": d.log2_variance,
        "channels_away": d.away,
    }
    if comparison is not None:
        evidence |= {
            f"{comparison.scale}_batch": comparison.batch,
            f"{comparison.scale}_running": comparison.running,
            f"{comparison.scale}_recalibrated": comparison.recalibrated,
            "recovered": comparison.recovered,
            "effect": comparison.effect,
            "samples": comparison.samples,
        }
    return {key.replace(" ", "_"): value for key, value in evidence.items()}
