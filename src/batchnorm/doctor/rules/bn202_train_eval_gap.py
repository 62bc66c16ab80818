from __future__ import annotations

from collections.abc import Iterator

from ..change import request_recalibration
from ..evidence.comparison import Comparison
from ..evidence.distance import Distance
from ..evidence.needs import Evidence, NotExamined
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
    assert evidence.measurements is not None
    distances = evidence.measurements.distances
    found = [(layer, distances[id(layer)]) for layer in evidence.layers if id(layer) in distances]
    away = [(layer, d) for layer, d in found if d.away]
    if away and evidence.measurements.comparison is None and not any(d.failing >= _SHARE for _, d in away):
        raise NotExamined("statistics differ, but no forward pass was left, or no answer came, to compare by")
    comparison = evidence.measurements.comparison
    for layer, d in away:
        severity = _severity(d, comparison)
        if severity is not None:
            yield Found(layer.name, _message(d, comparison), _evidence(d, comparison), severity=severity)


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
