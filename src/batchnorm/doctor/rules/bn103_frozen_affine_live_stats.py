from __future__ import annotations

from collections.abc import Iterator

from ..facts.facts import Facts
from ..rule import Found, rule


@rule(
    "BN103",
    "frozen-affine-live-stats",
    summary="γ and β do not learn, but the running statistics still move: the layer is only half frozen.",
    needs=("model",),
    fix="batchnorm.freeze(module) holds both, through every .train()",
    false_alarm="the statistics are meant to adapt to new data while γ and β stay (domain adaptation)",
)
def frozen_affine_live_stats(facts: Facts) -> Iterator[Found]:
    for layer in facts.layers:
        moves = layer.training and layer.tracks and layer.momentum != 0 and not layer.frozen
        moves = moves and getattr(layer.module, "track_running_stats", True)
        if not moves or not layer.affine or layer.affine_learns:
            continue
        yield Found(
            layer.name,
            "γ and β have requires_grad=False, yet each training batch moves the running statistics",
            {
                "features": layer.num_features,
                "momentum": "cumulative" if layer.momentum is None else float(layer.momentum),
            },
        )
