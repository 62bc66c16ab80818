from __future__ import annotations

from collections.abc import Iterator

from ..facts.facts import Facts
from ..rule import Found, rule

# Fewer values than these may agree by chance.
_VALUES = 8
# Under 10·ε of torch's own ε a signal is gone. A layer with a larger ε (1e-3 in the networks that come from
# TensorFlow) is only blamed above that for a channel far below its others.
_GONE, _FAR_BELOW = 1e-4, 0.01
# A new network's signals may all be small, by its initialization, and grow: there ε must be ten times the variance.
_GONE_WHEN_NEW = 0.1


@rule(
    "BN203",
    "dead-channel",
    summary="A channel's variance is under 10·ε: ε, not the data, decides its scale.",
    needs=("values",),
    fix="look at what feeds the channel: a dead ReLU, a zeroed filter, a constant feature, or inputs in tiny units",
    false_alarm="the channel is constant on purpose (padding of the width, an unused class)",
)
def dead_channel(facts: Facts) -> Iterator[Found]:
    for layer, seen in facts.observed():
        if seen.pooled.count < _VALUES or not layer.live:
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
