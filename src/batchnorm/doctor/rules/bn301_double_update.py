from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule


@rule(
    "BN301",
    "double-update",
    summary="Activation checkpointing repeats the forward inside backward, and the batch counts twice.",
    order=170,
    needs=("step",),
    fix="batchnorm.convert(model): our layers know a repeated forward and leave the buffers alone",
    false_alarm="momentum was set to 1 − √(1 − momentum) to make up for it",
)
def double_update(evidence: Evidence) -> Iterator[Found]:
    assert evidence.training is not None
    for updates in evidence.training.updates.values():
        if updates.recomputed:
            yield Found(
                updates.name,
                "moves its running statistics a second time when backward repeats the forward",
                {
                    "updates": updates.in_forward + updates.without_gradient,
                    "repeated": updates.recomputed,
                    "steps": evidence.training.steps,
                },
            )
