from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..change import request_recalibration
from ..evidence.needs import Evidence
from ..rule import Found, rule


@rule(
    "BN107",
    "broken-buffers",
    summary="Running statistics are NaN, infinite, or a variance is negative.",
    order=10,
    needs=("model or file",),
    fix="batchnorm.recalibrate(model, batches) once the weights are finite; train with nonfinite='skip'",
    false_alarm="the layer is never evaluated",
    repair=request_recalibration,
)
def broken_buffers(evidence: Evidence) -> Iterator[Found]:
    if evidence.file is not None:
        held = [(n.name, n.running_mean, n.running_var) for n in evidence.file.normalizations]
    else:
        held = [(layer.name, layer.running_mean, layer.running_var) for layer in evidence.layers if layer.tracks]
    for name, mean, var in held:
        if mean is None or var is None:
            continue
        counts = _broken(mean, var)
        if counts:
            what = " and ".join(key.replace("_", " ") for key in counts)
            yield Found(name, f"its buffers hold {what}: every evaluation is wrong", counts, severity="error")


def _broken(mean: Tensor, var: Tensor) -> dict[str, float | int | str]:
    counts = {
        "nonfinite_means": int((~mean.isfinite()).sum()),
        "nonfinite_variances": int((~var.isfinite()).sum()),
        "negative_variances": int((var < 0).sum()),
    }
    return {key: count for key, count in counts.items() if count}
