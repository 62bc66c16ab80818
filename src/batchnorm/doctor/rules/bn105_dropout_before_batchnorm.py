from __future__ import annotations

import math
from collections.abc import Iterator

from ...statistics.measured import Measured
from ..facts.facts import Facts, NotExamined
from ..facts.graph import Node
from ..facts.layers import Layer
from ..rule import Found, rule

# Ratio of the variances with and without dropout, arXiv 1801.05134.
AWAY, FAILS = 1.05, 1.2


@rule(
    "BN105",
    "dropout-before-batchnorm",
    summary="Dropout raises the variance that a batch normalization learns, and evaluation runs without it.",
    needs=("graph",),
    fix="move the dropout behind the last batch normalization, or recalibrate with batchnorm.recalibrate",
    false_alarm="dropout also runs in evaluation (Monte Carlo dropout)",
)
def dropout_before_batchnorm(facts: Facts) -> Iterator[Found]:
    assert facts.graph is not None
    pairs: dict[int, tuple[Layer, Node]] = {}
    for node in facts.graph.of_kind("dropout"):
        if node.p > 0:
            for norm in facts.graph.first_norms_after(node):
                if getattr(norm.owner, "live", False) and norm.owner.running_mean is not None:
                    pairs.setdefault(id(norm.owner), (norm.owner, node))
    unmeasured = False
    for layer, node in pairs.values():
        seen = facts.measured(layer)
        if facts.real_batches and seen is not None:
            if not seen.dropped.count:
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


def _measured(layer: Layer, node: Node, seen: Measured) -> Iterator[Found]:
    """The mean over channels of the log ratio, beyond what the spread over channels explains."""
    on, off = seen.dropped.var, seen.kept.var
    alive = (off > 10 * layer.eps) & (on > 0)
    if not alive.any():
        return
    logs = (on[alive] / off[alive]).log().abs() if int(alive.sum()) == 1 else (on[alive] / off[alive]).log()
    noise = 2 * float(logs.std()) / math.sqrt(len(logs)) if len(logs) > 1 else math.sqrt(2 / seen.dropped.count)
    ratio = math.exp(float(logs.mean()))
    surely = math.exp(float(logs.mean()) - noise)
    if surely > AWAY:
        yield Found(
            layer.name,
            f"dropout {node.name} makes its input's variance {ratio:.2f} times that of evaluation",
            {"variance_ratio": ratio, "p": node.p},
            severity="error" if surely > FAILS else "warning",
        )
