from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule


@rule(
    "BN302",
    "gradient-accumulation",
    summary="Gradients are accumulated over several forwards: the statistics are those of the small batches.",
    order=180,
    needs=("step",),
    fix="divide momentum by the number of accumulated batches, and judge the batch size by the small ones",
    false_alarm="the passes between two optimizer steps are of different kinds, such as real and generated samples",
)
def gradient_accumulation(evidence: Evidence) -> Iterator[Found]:
    training = evidence.training
    assert training is not None
    if training.optimizers > 1:  # adversarial training: every second pass belongs to the other network
        return
    found = [updates for updates in training.updates.values() if updates.passes_a_step >= 2]
    if found:
        passes = max(updates.passes_a_step for updates in found)
        yield Found(
            found[0].name,
            f"{passes:.3g} statistics updates for each change of the parameters, in {len(found)} layers",
            {"updates_a_step": passes, "layers": len(found), "optimizers": training.optimizers},
        )
