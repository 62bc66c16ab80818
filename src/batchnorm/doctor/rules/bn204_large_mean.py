from __future__ import annotations

from collections.abc import Iterator

from ..facts.facts import Facts
from ..rule import Found, rule

LARGE = 1e3
_VALUES = 8


@rule(
    "BN204",
    "large-mean",
    summary="A channel's mean is over 1,000 times its standard deviation: float32 loses the signal in it.",
    needs=("values",),
    fix="subtract a constant from the inputs, or standardize them, before the network",
    false_alarm="the network runs in float64",
)
def large_mean(facts: Facts) -> Iterator[Found]:
    for layer, seen in facts.observed():
        if seen.pooled.count < _VALUES or not layer.live:
            continue
        mean, var = seen.pooled.mean, seen.pooled.var
        # With a variance under 10·ε the channel is dead (BN203), whatever its mean.
        ratio = (mean.abs() / (var + layer.eps).sqrt()).where(var >= 10 * layer.eps, 0.0)
        if (ratio > LARGE).any():
            worst = float(ratio.max())
            yield Found(
                layer.name,
                f"a mean {worst:.0f} times its standard deviation: the variance loses {6e-8 * worst**2:.1g} of itself",
                {"mean_over_std": worst, "channels": int((ratio > LARGE).sum())},
            )
