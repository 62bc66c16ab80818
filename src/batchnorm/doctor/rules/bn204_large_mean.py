from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule

_LARGE = 1e3
_VALUES = 8


@rule(
    "BN204",
    "large-mean",
    summary="A channel's mean is over 1,000 times its standard deviation: float32 loses the signal in it.",
    order=190,
    needs=("values",),
    fix="subtract a constant from the inputs, or standardize them, before the network",
    false_alarm="the network runs in float64",
)
def large_mean(evidence: Evidence) -> Iterator[Found]:
    for layer, seen in evidence.observed():
        if seen.pooled.count < _VALUES or layer.frozen:
            continue
        mean, var = seen.pooled.mean, seen.pooled.var
        # A channel with a variance under 10·ε is dead (BN203), whatever its mean.
        ratio = (mean.abs() / (var + layer.eps).sqrt()).where(var >= 10 * layer.eps, 0.0)
        if (ratio > _LARGE).any():
            worst = float(ratio.max())
            yield Found(
                layer.name,
                f"a mean {worst:.0f} times its standard deviation: the variance loses {6e-8 * worst**2:.1g} of itself",
                {"mean_over_std": worst, "channels": int((ratio > _LARGE).sum())},
            )
