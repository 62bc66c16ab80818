from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..change import request_recalibration
from ..evidence.needs import Evidence
from ..rule import Found, NotExamined, rule


@rule(
    "BN106",
    "untrained-statistics",
    summary="The model is evaluated, or averaged, on running statistics that are still the initial 0 and 1.",
    order=20,
    needs=("model or file",),
    fix="batchnorm.recalibrate(model, batches), or copy the buffers together with the parameters",
    false_alarm="inputs of mean 0 and variance 1 in every channel are what the layer really gets",
    repair=request_recalibration,
)
def untrained_statistics(evidence: Evidence) -> Iterator[Found]:
    if evidence.file is not None:
        yield from _in_file(evidence)
        return
    assert evidence.model is not None
    averaged = _averaged_modules(evidence.model)
    for layer in evidence.layers:
        if layer.frozen or not layer.is_initial:
            continue
        copied = layer.module is not None and id(layer.module) in averaged
        if not copied and (layer.training or not evidence.evaluates(layer)):
            continue
        updates = layer.num_batches_tracked
        yield Found(
            layer.name,
            "an averaged copy of a trained model, with the running statistics of a new one"
            if copied
            else "evaluates with mean 0 and variance 1, which no batch has ever moved",
            {"features": layer.num_features, "num_batches_tracked": 0 if updates is None else int(updates)},
            severity="error",
        )


def _in_file(evidence: Evidence) -> Iterator[Found]:
    assert evidence.file is not None
    if evidence.file.origin != "checkpoint":
        raise NotExamined("needs the model or a checkpoint")
    for norm in evidence.file.normalizations:
        mean, var, updates = norm.running_mean, norm.running_var, norm.num_batches_tracked
        if mean is not None and var is not None and not norm.training and not mean.any() and bool((var == 1).all()):
            yield Found(
                norm.name,
                "the checkpoint holds mean 0 and variance 1, which no batch has ever moved",
                {"features": mean.numel(), "num_batches_tracked": 0 if updates is None else int(updates)},
                severity="error",
            )


def _averaged_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules inside an EMA or SWA copy that has averaged something already."""
    return {
        id(module)
        for copy in model.modules()
        if isinstance(copy, AveragedModel) and int(copy.n_averaged) > 0
        for module in copy.modules()
    }
