from __future__ import annotations

import math
from collections.abc import Iterator

from ...inspect.graph import GraphNode
from ...inspect.operators import Effect
from ...statistics.measured import Measured
from ..evidence.needs import Evidence, NotExamined
from ..evidence.normalizations import Layer
from ..rule import Found, rule

# Ratio of the variances with and without dropout: a warning, an error (arXiv 1801.05134).
_WARNING, _ERROR = 1.05, 1.2


@rule(
    "BN105",
    "dropout-before-batchnorm",
    summary="Dropout raises the variance that a batch normalization learns, and evaluation runs without it.",
    order=110,
    needs=("graph",),
    wants=("dropout",),
    fix="move the dropout behind the last batch normalization, or recalibrate with batchnorm.recalibrate",
    false_alarm="dropout also runs in evaluation (Monte Carlo dropout)",
)
def dropout_before_batchnorm(evidence: Evidence) -> Iterator[Found]:
    assert evidence.graph is not None
    pairs: dict[int, tuple[Layer, GraphNode]] = {}
    for node in evidence.graph.of_effect(Effect.DROPOUT):
        for layer in map(evidence.layer_of, node.first_norms() if node.p > 0 else ()):
            if layer is not None and not layer.frozen and layer.running_mean is not None:
                pairs.setdefault(id(layer), (layer, node))
    unmeasured = False
    for layer, node in pairs.values():
        seen = evidence.measured(layer)
        if evidence.real_batches and seen is not None:
            if not seen.dropout_on.count:
                unmeasured = True
            else:
                yield from _measured(layer, node, seen)
        else:
            yield Found(
                layer.name,
                f"reads what dropout {node.name} leaves: its variance differs between training and evaluation",
                {"p": node.p},
            )
    if unmeasured and len(pairs) == 1:
        raise NotExamined("no forward pass was left to run with dropout on: pass more batches")


def _measured(layer: Layer, node: GraphNode, seen: Measured) -> Iterator[Found]:
    """Yield a finding where the mean log ratio over channels exceeds what their spread explains."""
    on, off = seen.dropout_on.var, seen.dropout_off.var
    alive = (off > 10 * layer.eps) & (on > 0)
    if not alive.any():
        return
    logs = (on[alive] / off[alive]).log().abs() if int(alive.sum()) == 1 else (on[alive] / off[alive]).log()
    noise = 2 * float(logs.std()) / math.sqrt(len(logs)) if len(logs) > 1 else math.sqrt(2 / seen.dropout_on.count)
    ratio = math.exp(float(logs.mean()))
    surely = math.exp(float(logs.mean()) - noise)
    if surely > _WARNING:
        yield Found(
            layer.name,
            f"dropout {node.name} makes its input's variance {ratio:.2f} times that of evaluation",
            {"variance_ratio": ratio, "p": node.p},
            severity="error" if surely > _ERROR else "warning",
        )
