from __future__ import annotations

from collections.abc import Iterator

from ..evidence.distance import LOG2_AWAY, LOG2_FAILS, MEAN_AWAY, MEAN_FAILS
from ..evidence.needs import Evidence
from ..rule import Found, rule

_ROUNDING = 1e-4


@rule(
    "BN304",
    "rank-divergence",
    summary="Ranks hold different running statistics: which one is saved decides the result.",
    order=60,
    needs=("ranks",),
    fix="batchnorm.convert(model, process_group='world'), or recalibrate with process_group before saving",
    false_alarm="each rank is meant to evaluate on data of its own with statistics of its own",
)
def rank_divergence(evidence: Evidence) -> Iterator[Found]:
    assert evidence.ranks is not None
    ranks = evidence.ranks
    if not ranks.same_layers:
        yield Found("", "the ranks do not have the same batch normalizations", {"ranks": ranks.size}, severity="error")
    # DistributedDataParallel sends the buffers of rank 0 before each forward. So ranks differ by one update normally.
    mean_limit, log2_limit = (MEAN_AWAY, LOG2_AWAY) if ranks.broadcast else (_ROUNDING, _ROUNDING)
    for layer in evidence.layers:
        shift, log2 = ranks.spread.get(id(layer), (0.0, 0.0))
        if shift > mean_limit or log2 > log2_limit:
            yield Found(
                layer.name,
                f"means differ between ranks by up to {shift:.2g} standard deviations",
                {"mean_shift": shift, "log2_variance": log2, "ranks": ranks.size},
                severity="error" if shift > MEAN_FAILS or log2 > LOG2_FAILS else "warning",
            )
