from __future__ import annotations

from collections.abc import Iterator

from ..facts.facts import Facts
from ..rule import Found, rule


@rule(
    "BN104",
    "weight-decay-on-affine",
    summary="The optimizer decays γ and β. The evidence on whether that hurts is mixed.",
    needs=("optimizer",),
    fix="build the optimizer from batchnorm.param_groups(model, weight_decay)",
    false_alarm="the decay was tuned with γ and β in it",
)
def weight_decay_on_affine(facts: Facts) -> Iterator[Found]:
    assert facts.optimizer is not None
    decays = {id(p): float(g.get("weight_decay", 0.0)) for g in facts.optimizer.param_groups for p in g["params"]}
    for layer in facts.layers:
        found = [decays[id(t)] for t in layer.affine if t.requires_grad and decays.get(id(t))]
        if found:
            yield Found(
                layer.name, "γ and β shrink toward 0 at every step", {"weight_decay": max(found)}, severity="info"
            )
