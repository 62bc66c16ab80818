from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule


@rule(
    "BN305",
    "statistics-without-gradient",
    summary="Running statistics move in forwards that no gradient is taken of.",
    order=175,
    needs=("step",),
    fix="call .eval() on that model before the forward, and .train() after it if it trains too",
    false_alarm="these forwards are meant to count: a momentum encoder in training mode, a generator's samples",
)
def statistics_without_gradient(evidence: Evidence) -> Iterator[Found]:
    training = evidence.training
    assert training is not None
    for updates in training.updates.values():
        if updates.unused:
            forwards = updates.in_forward + updates.without_gradient
            yield Found(
                updates.name,
                f"moves its running statistics in {updates.unused} of {forwards} forwards without a gradient",
                {"without_gradient": updates.unused, "forwards": forwards, "steps": training.steps},
            )
