from __future__ import annotations

import math
from collections.abc import Iterator

from ..facts.facts import Facts
from ..rule import Found, rule

LEFT = 0.01


@rule(
    "BN303",
    "short-horizon",
    summary="After the planned steps, over 1 % of a running statistic is still what it began with.",
    needs=("model", "steps"),
    fix="a larger momentum, momentum=None (the mean of all batches), or batchnorm.recalibrate after training",
    false_alarm="the statistics are right already and training only continues",
)
def short_horizon(facts: Facts) -> Iterator[Found]:
    assert facts.steps is not None
    for layer in facts.layers:
        momentum = layer.momentum
        if momentum is None or not 0 < momentum < 1 or layer.running_mean is None or layer.frozen:
            continue
        left = (1 - momentum) ** facts.steps
        if left > LEFT:
            needed = math.ceil(math.log(LEFT) / math.log(1 - momentum))
            yield Found(
                layer.name,
                f"{left:.0%} of its initial statistics are left after {facts.steps} steps; {needed} would be enough",
                {"left": left, "steps": facts.steps, "momentum": float(momentum), "needed": needed},
            )
