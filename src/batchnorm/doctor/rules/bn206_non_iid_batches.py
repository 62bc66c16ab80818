from __future__ import annotations

from collections.abc import Iterator

from ...statistics.batch_order import likely_ratio, variance_ratio
from ..evidence.needs import Evidence, NotExamined
from ..rule import Found, rule


@rule(
    "BN206",
    "non-iid-batches",
    summary="Means differ between batches more than random sampling explains: batches are sorted or clustered.",
    order=90,
    needs=("batches",),
    fix="shuffle the samples: DataLoader(shuffle=True), or mix the sources within a batch",
    false_alarm="the order of the batches given is not that of the training",
)
def non_iid_batches(evidence: Evidence) -> Iterator[Found]:
    live = [(layer, seen) for layer, seen in evidence.observed() if not layer.frozen and layer.training]
    if not live and evidence.layers:
        raise NotExamined("no layer takes batch statistics: the model is not in training mode")
    worst = max(((variance_ratio(seen), layer) for layer, seen in live), key=lambda pair: pair[0], default=None)
    if worst is None:
        return
    ratio, layer = worst
    batches = evidence.measurements.batches if evidence.measurements else 0
    if ratio > likely_ratio(batches):
        yield Found(
            layer.name,
            f"the means of batches vary {ratio:.1f} times as much as those of randomly drawn ones",
            {"variance_ratio": ratio, "batches": batches},
        )
