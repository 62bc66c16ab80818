from __future__ import annotations

from collections.abc import Iterator

import torch

from ..facts.facts import Facts, NotExamined
from ..facts.moments import Measured
from ..rule import Found, rule

RATIO = 2.0


@rule(
    "BN206",
    "non-iid-batches",
    summary="Means differ between batches more than random sampling explains: batches are sorted or clustered.",
    needs=("batches",),
    fix="shuffle the samples: DataLoader(shuffle=True), or mix the sources within a batch",
    false_alarm="the order of the batches given is not that of the training",
)
def non_iid_batches(facts: Facts) -> Iterator[Found]:
    live = [(layer, seen) for layer, seen in facts.observed() if layer.live and layer.training]
    if not live and facts.layers:
        raise NotExamined("no layer takes batch statistics: the model is not in training mode")
    worst = max(((_ratio(seen), layer) for layer, seen in live), key=lambda pair: pair[0], default=None)
    if worst is None:
        return
    ratio, layer = worst
    batches = facts.measurements.batches if facts.measurements else 0
    if ratio > max(RATIO, _by_chance(batches - 1)):
        yield Found(
            layer.name,
            f"the means of batches vary {ratio:.1f} times as much as those of randomly drawn ones",
            {"variance_ratio": ratio, "batches": batches},
        )


def _ratio(seen: Measured) -> float:
    """Σ nᵢ(mᵢ−m)²/(B−1) over the variance of the per-sample means: 1 for random batches, on average over channels."""
    sizes = torch.tensor(seen.batch_samples, dtype=torch.float64)
    if len(sizes) < 2 or float(sizes.median()) < 2:
        return 0.0  # batches of one sample vary as samples do
    means = torch.stack(seen.batch_means)
    sizes = sizes.to(means.device)[:, None]
    between = (sizes * (means - (sizes * means).sum(0) / sizes.sum()).square()).sum(0) / (len(means) - 1)
    within = seen.samples.unbiased
    alive = within > 1e-12
    return float((between[alive] / within[alive]).mean()) if alive.any() else 0.0


def _by_chance(freedom: int) -> float:
    """What χ²/freedom exceeds once in ten thousand (Wilson & Hilferty): all channels may move as one."""
    spread = 2 / (9 * max(1, freedom))
    return (1 - spread + 3.719 * spread**0.5) ** 3
