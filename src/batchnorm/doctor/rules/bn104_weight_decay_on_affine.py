from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

from ..change import Change, RepairContext
from ..diagnosis import Finding, shown
from ..evidence.needs import Evidence
from ..rule import Found, rule


def stop_decay(context: RepairContext, finding: Finding) -> list[Change]:
    """Move γ and β into an optimizer group without weight decay. The optimizer keeps its state."""
    norm, optimizer = context.module(finding.module), context.optimizer
    if norm is None or optimizer is None:
        return []
    own = {id(p) for p in (norm.weight, norm.bias) if p is not None}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own and group.get("weight_decay")]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in own]
            _group_without_decay(optimizer, group)["params"] += moved
    decay = shown(finding.evidence["weight_decay"])
    return [Change(finding.code, finding.module, "weight decay of γ and β", decay, "0", safe=False)]


def _group_without_decay(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Return the group without decay that has all other settings of `group`; make it where it is missing."""
    settings = {**_settings(group), "weight_decay": 0.0, "batch_norm": True}
    for other in optimizer.param_groups:
        if _settings(other) == settings:
            return other
    optimizer.param_groups.append({**settings, "params": []})
    return optimizer.param_groups[-1]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


@rule(
    "BN104",
    "weight-decay-on-affine",
    summary="The optimizer decays γ and β. The evidence on whether that hurts is mixed.",
    order=230,
    needs=("optimizer",),
    fix="build the optimizer from batchnorm.param_groups(model, weight_decay)",
    false_alarm="the decay was tuned with γ and β in it",
    repair=stop_decay,
    unsafe=True,
)
def weight_decay_on_affine(evidence: Evidence) -> Iterator[Found]:
    assert evidence.optimizer is not None
    decays = {id(p): float(g.get("weight_decay", 0.0)) for g in evidence.optimizer.param_groups for p in g["params"]}
    for layer in evidence.layers:
        found = [decays[id(t)] for t in layer.affine if t.requires_grad and decays.get(id(t))]
        if found:
            yield Found(
                layer.name, "γ and β shrink toward 0 at every step", {"weight_decay": max(found)}, severity="info"
            )
