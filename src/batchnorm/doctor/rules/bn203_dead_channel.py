from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule

# Fewer values than this may be equal by chance.
_VALUES = 8
# A variance under 10·ε of torch's default ε is a lost signal. With a larger ε (1e-3 in networks that come from
# TensorFlow) a larger variance counts only where it is far below the layer's median.
_GONE, _FAR_BELOW = 1e-4, 0.01
# The signals of a new network may all be small, because of its initialization, and grow later. So ε must be ten
# times the variance there.
_GONE_WHEN_NEW = 0.1


@rule(
    "BN203",
    "dead-channel",
    summary="A channel's variance is under 10·ε: ε, not the data, decides its scale.",
    order=200,
    needs=("values",),
    fix="look at what feeds the channel: a dead ReLU, a zeroed filter, a constant feature, or inputs in tiny units",
    false_alarm="the channel is constant on purpose (padding of the width, an unused class)",
)
def dead_channel(evidence: Evidence) -> Iterator[Found]:
    for layer, seen in evidence.observed():
        if seen.pooled.count < _VALUES or layer.frozen:
            continue
        var = seen.pooled.var
        gone = min(_GONE, _GONE_WHEN_NEW * layer.eps) if layer.is_initial else _GONE
        dead = (var < 10 * layer.eps) & ((var < gone) | (var < _FAR_BELOW * var.median()))
        if dead.any():
            yield Found(
                layer.name,
                f"{int(dead.sum())} of {len(var)} channels vary by less than 10·ε",
                {
                    "dead": int(dead.sum()),
                    "channels": len(var),
                    "smallest_variance": float(var.min()),
                    "eps": layer.eps,
                },
            )
