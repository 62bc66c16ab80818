from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule

_LARGE = 3e4


@rule(
    "BN207",
    "overflow-risk",
    summary="Half-precision activations over 3·10⁴; float16 ends at 65,504.",
    order=80,
    needs=("values",),
    fix="scale the inputs down, or run the layers before it in bfloat16 or float32",
    false_alarm="larger inputs than these can never come",
)
def overflow_risk(evidence: Evidence) -> Iterator[Found]:
    for layer, seen in evidence.observed():
        if seen.largest > _LARGE or seen.nonfinite:
            lost = f", and {seen.nonfinite} values are infinite or NaN already" if seen.nonfinite else ""
            yield Found(
                layer.name,
                f"float16 values up to {seen.largest:.0f} at this layer{lost}",
                {"largest": seen.largest, "nonfinite": seen.nonfinite},
                severity="error" if seen.nonfinite else "warning",
            )
