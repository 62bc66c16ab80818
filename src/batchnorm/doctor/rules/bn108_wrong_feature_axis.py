from __future__ import annotations

from collections.abc import Iterator

from ...inspect.operators import Effect
from ..evidence.needs import Evidence
from ..rule import Found, rule


@rule(
    "BN108",
    "wrong-feature-axis",
    summary="The features lie on another axis than 1: (N, L, C) was fed to a layer that takes (N, C, L).",
    order=50,
    needs=("run",),
    fix="transpose before and after: bn(x.transpose(1, 2)).transpose(1, 2)",
    false_alarm="axis 1 is meant to be normalized, each position over the batch and its features",
)
def wrong_feature_axis(evidence: Evidence) -> Iterator[Found]:
    assert evidence.measurements is not None
    wrong = evidence.measurements.wrong_axis
    if wrong is not None:
        yield Found(
            wrong.layer.name,
            f"the forward raises: an input of shape {wrong.shape} for {wrong.layer.num_features} features on axis 1",
            {"axis_1": wrong.shape[1], "last_axis": wrong.shape[-1], "num_features": wrong.layer.num_features},
            severity="error",
        )
    seen: set[str] = set()
    for node in evidence.graph.of_effect(Effect.NORM) if evidence.graph is not None else ():
        shape = node.input.shape if node.input is not None else ()
        axis = node.channel_axis(len(shape))
        if len(shape) < 3 or node.feature_axis in (None, axis) or axis is None or node.name in seen:
            continue
        seen.add(node.name)
        yield Found(
            node.name,
            f"its input {shape} comes from a layer with its features on axis {node.feature_axis}, but axis {axis}, of "
            "the same length as num_features by chance, is normalized",
            {f"axis_{axis}": shape[axis], "last_axis": shape[-1], "num_features": shape[axis]},
            severity="error",
        )
