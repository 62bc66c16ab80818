from __future__ import annotations

from collections.abc import Iterator

from ..change import request_recalibration
from ..evidence.comparison import Comparison
from ..evidence.distance import Distance
from ..evidence.needs import Evidence, NotExamined
from ..evidence.normalizations import Layer
from ..rule import Found, rule

# Share of channels from which a layer counts as away. One odd channel in a hundred proves nothing.
_SHARE = 0.1
# Smallest change of the answers that is a gap, and a large one, in standard deviations of the answers.
_EFFECT, _LARGE_EFFECT = 0.1, 0.5
_RECOVERED = 0.5


@rule(
    "BN202",
    "train-eval-gap",
    summary="The running statistics are away from the population's, and evaluation pays for it.",
    order=40,
    needs=("samples",),
    wants=("comparison",),
    fix="batchnorm.recalibrate(model, batches)",
    false_alarm="the batches given are not drawn as the training data were",
    repair=request_recalibration,
)
def train_eval_gap(evidence: Evidence) -> Iterator[Found]:
    measurements = evidence.measurements
    assert measurements is not None
    found = [(layer, measurements.distances.get(id(layer))) for layer in evidence.layers]
    away = [(layer, d) for layer, d in found if d is not None and d.away]
    live = [(layer, d) for layer, d in away if not layer.frozen]
    comparison = measurements.comparison
    if live and comparison is None and not any(d.failing >= _SHARE for _, d in live):
        raise NotExamined("statistics differ, but no forward pass was left, or no answer came, to compare by")
    for layer, d in live:
        severity = _severity(d, comparison)
        if severity is not None:
            yield Found(layer.name, _message(d, comparison), _evidence(d, comparison), severity=severity)
    yield from _frozen([(layer, d) for layer, d in away if layer.frozen], measurements.freed, bool(live))


def _frozen(away: list[tuple[Layer, Distance]], freed: Comparison | None, others: bool) -> Iterator[Found]:
    """Layers that are held at statistics which are not these batches', which may be meant: the targets decide."""
    if away and not others and (freed is None or not freed.judged):
        raise NotExamined(
            "frozen statistics are away from these batches': pass targets, to tell whether it costs anything"
        )
    if freed is None or not freed.costs or freed.effect <= _EFFECT or freed.recovered < _RECOVERED:
        return
    for layer, d in away:
        if d.away >= _SHARE:
            fix = "batchnorm.unfreeze(model), then batchnorm.recalibrate(model, batches)"
            text = f"it is frozen, and {_message(d, freed)}"
            yield Found(layer.name, text, _evidence(d, freed), severity="error", fix=fix)


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
