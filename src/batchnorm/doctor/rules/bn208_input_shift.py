from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule

# Smallest change of the answers that counts, in standard deviations of the answers.
_EFFECT = 0.1


@rule(
    "BN208",
    "input-shift",
    summary="The network's input is scaled and shifted against the one that its statistics were learned on.",
    order=38,
    needs=("values",),
    wants=("comparison",),
    fix="prepare the data as in training: the same division, mean and standard deviation (do not recalibrate)",
    false_alarm="the model is meant for data of this scale now; then recalibrate, and say so where the data are made",
)
def input_shift(evidence: Evidence) -> Iterator[Found]:
    measurements = evidence.measurements
    assert measurements is not None
    found, symptom = measurements.input_shift, measurements.symptom
    if found is None or symptom is None or not (symptom.costs or symptom.effect > _EFFECT):
        return
    numbers: dict[str, float | int | str] = {
        "input_scale": found.scale,
        "input_shift": found.shift,
        "explained": found.explained,
    }
    yield Found(
        found.layer.name,
        f"the inputs are {found.scale:.3g}·x {'+' if found.shift >= 0 else '−'} {abs(found.shift):.3g} of what its "
        "running statistics were learned on: the preprocessing differs",
        numbers | ({"gap": symptom.gap} if symptom.judged else {"effect": symptom.effect}),
        severity="error" if symptom.costs or not symptom.judged else "warning",
    )
