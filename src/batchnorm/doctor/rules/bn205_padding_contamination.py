from __future__ import annotations

from collections.abc import Iterator

from ...statistics.measured import Measured
from ..evidence.needs import Evidence
from ..rule import Found, NotExamined, rule

# Shift of the mean in σ of the real positions, and log2 ratio of the variances: that of one tenth of zeros.
_MEAN, _LOG2 = 0.1, 0.15


@rule(
    "BN205",
    "padding-contamination",
    summary="Padded positions take part in the statistics.",
    order=70,
    needs=("mask",),
    fix="batchnorm.convert(model), and pass the mask: bn(x, mask=mask)",
    false_alarm="the padding is data: it is drawn like the real positions",
)
def padding_contamination(evidence: Evidence) -> Iterator[Found]:
    misfits = 0
    observed = evidence.observed()
    for layer, seen in observed:
        misfits += bool(seen.misfits)
        if layer.frozen or not seen.valid_pixels.count or seen.valid_pixels.count == seen.all_pixels.count:
            continue
        shift, log2 = _contamination(seen, layer.eps)
        if not (shift <= _MEAN and log2 <= _LOG2):  # also true where padding holds NaN
            share = 1 - seen.valid_pixels.count / seen.all_pixels.count
            yield Found(
                layer.name,
                f"{share:.0%} of the positions in its statistics are padding",
                {"padding": share, "mean_shift": shift, "log2_variance": log2},
            )
    if observed and misfits == len(observed):
        raise NotExamined("the mask fits the positions of no layer: it should be (N, L), or of the input's shape")


def _contamination(seen: Measured, eps: float) -> tuple[float, float]:
    """Return the root mean square over channels of the shift of the mean and of the log2 ratio of the variance."""
    valid = seen.valid_pixels.var + eps
    shift = ((seen.all_pixels.mean - seen.valid_pixels.mean) / valid.sqrt()).square().mean().sqrt()
    log2 = ((seen.all_pixels.var + eps) / valid).log2().square().mean().sqrt()
    return float(shift), float(log2)
