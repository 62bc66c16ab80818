from __future__ import annotations

import math
from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule

_LEFT = 0.01


@rule(
    "BN303",
    "short-horizon",
    summary="After the planned steps, over 1 % of a running statistic is still what it began with.",
    order=160,
    needs=("model", "steps"),
    fix="a larger momentum, momentum=None (the mean of all batches), or batchnorm.recalibrate after training",
    false_alarm="the statistics are right already and training only continues",
)
def short_horizon(evidence: Evidence) -> Iterator[Found]:
    assert evidence.steps is not None
    for layer in evidence.layers:
        momentum = layer.momentum
        if momentum is None or not 0 < momentum < 1 or layer.running_mean is None or layer.frozen:
            continue
        left = (1 - momentum) ** evidence.steps
        if left > _LEFT:
            needed = math.ceil(math.log(_LEFT) / math.log(1 - momentum))
            yield Found(
                layer.name,
                f"{left:.0%} of its initial statistics are left after {evidence.steps} steps; {needed} would be enough",
                {"left": left, "steps": evidence.steps, "momentum": float(momentum), "needed": needed},
            )
