from __future__ import annotations

from collections.abc import Iterator

import torch

from ...inspect.operators import Effect
from ..change import Change, RepairContext
from ..diagnosis import Finding
from ..evidence.needs import Evidence
from ..evidence.normalizations import Layer
from ..rule import Found, rule


def keep_statistics(context: RepairContext, finding: Finding) -> list[Change]:
    """Give the layer running statistics, to be filled by recalibration, or put it into evaluation mode."""
    norm = context.module(finding.module)
    if norm is None:
        return []
    context.recalibrate_for.add(finding.code)
    if norm.running_mean is not None:
        norm.eval()
        return [Change(finding.code, finding.module, "mode", "training", "evaluation", "{}.eval()")]
    device = next((t.device for t in norm.parameters()), None)
    norm.register_buffer("running_mean", torch.zeros(norm.num_features, device=device))
    norm.register_buffer("running_var", torch.ones(norm.num_features, device=device))
    norm.register_buffer("num_batches_tracked", torch.tensor(0, device=device))
    norm.track_running_stats = True
    norm.eval()
    statement = "{0}.__init__({0}.num_features, {0}.eps, {0}.momentum, {0}.affine)"
    return [Change(finding.code, finding.module, "track_running_stats", "False", "True", statement, safe=False)]


@rule(
    "BN111",
    "batch-statistics-in-eval",
    summary="The model is evaluated, and the answer for one sample depends on the others in its batch.",
    order=35,
    needs=("model",),
    fix="keep running statistics (track_running_stats=True), fill them by batchnorm.recalibrate(model, batches)",
    false_alarm="a batch is meant to be one whole: a task of meta-learning, adaptation at test time",
    repair=keep_statistics,
    unsafe=True,
)
def batch_statistics_in_eval(evidence: Evidence) -> Iterator[Found]:
    for layer in evidence.layers:
        reason, fix = _reason(layer)
        if reason and evidence.evaluates(layer):
            numbers: dict[str, float | int | str] = {"features": layer.num_features, "training": int(layer.training)}
            yield Found(layer.name, f"{reason}: it normalizes by the batch", numbers, severity="error", fix=fix)
    for node in evidence.graph.of_effect(Effect.NORM) if evidence.graph is not None and not evidence.trains else ():
        if node.module is None and node.by_batch:
            yield Found(
                node.name,
                "a call with training=True: it normalizes by the batch in evaluation too",
                {"training": 1},
                severity="error",
                fix="pass training=self.training, and running statistics",
            )


def _reason(layer: Layer) -> tuple[str, str | None]:
    if layer.module is None or layer.kind == "look-alike":
        return "", None
    if layer.running_mean is None:
        return "keeps no running statistics", None
    if layer.training:
        return "is in training mode in a model that is evaluated", "call model.eval(), which reaches every layer"
    return "", None
