from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..facts.facts import Facts
from ..rule import Found, NotExamined, rule


@rule(
    "BN107",
    "broken-buffers",
    summary="Running statistics are NaN, infinite, or a variance is negative.",
    needs=(),
    fix="batchnorm.recalibrate(model, batches) once the weights are finite; train with nonfinite='skip'",
    false_alarm="the layer is never evaluated",
)
def broken_buffers(facts: Facts) -> Iterator[Found]:
    if facts.file is not None:
        held = [(n.name, n.running_mean, n.running_var) for n in facts.file.normalizations]
    elif facts.model is not None:
        held = [(layer.name, layer.running_mean, layer.running_var) for layer in facts.layers if layer.tracks]
    else:
        raise NotExamined("needs the model or a file")
    for name, mean, var in held:
        if mean is None or var is None:
            continue
        evidence = _broken(mean, var)
        if evidence:
            what = " and ".join(key.replace("_", " ") for key in evidence)
            yield Found(name, f"its buffers hold {what}: every evaluation is wrong", evidence, severity="error")


def _broken(mean: Tensor, var: Tensor) -> dict[str, float | int | str]:
    counts = {
        "nonfinite_means": int((~mean.isfinite()).sum()),
        "nonfinite_variances": int((~var.isfinite()).sum()),
        "negative_variances": int((var < 0).sum()),
    }
    return {key: count for key, count in counts.items() if count}
