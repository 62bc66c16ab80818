from __future__ import annotations

from collections.abc import Iterator

from ...model_tools.freeze import freeze
from ..change import Change, RepairContext
from ..diagnosis import Finding
from ..evidence.needs import Evidence
from ..rule import Found, rule


def freeze_layer(context: RepairContext, finding: Finding) -> list[Change]:
    """Freeze the layer, so that its statistics are held as γ and β are; at those that a recalibration leaves."""
    norm = context.module(finding.module)
    if norm is None:
        return []
    context.afterwards.append(lambda: freeze(norm))
    statement = "batchnorm.freeze({})"
    return [Change(finding.code, finding.module, "running statistics", "moving", "held", statement, safe=False)]


@rule(
    "BN103",
    "frozen-affine-live-stats",
    summary="γ and β do not learn, but the running statistics still move: the layer is only half frozen.",
    order=130,
    needs=("model",),
    fix="batchnorm.freeze(module) holds both, through every .train()",
    false_alarm="the statistics are meant to adapt to new data while γ and β stay (domain adaptation)",
    repair=freeze_layer,
    unsafe=True,
)
def frozen_affine_live_stats(evidence: Evidence) -> Iterator[Found]:
    for layer in evidence.layers:
        moves = layer.training and layer.tracks and layer.momentum != 0 and not layer.frozen
        moves = moves and getattr(layer.module, "track_running_stats", True)
        if not moves or not layer.affine_is_held:
            continue
        yield Found(
            layer.name,
            "γ and β have requires_grad=False, yet each training batch moves the running statistics",
            {
                "features": layer.num_features,
                "momentum": "cumulative" if layer.momentum is None else float(layer.momentum),
            },
        )
