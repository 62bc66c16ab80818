from __future__ import annotations

from collections.abc import Iterator

from ...inspect.folding import foldable
from ..evidence.needs import Evidence, NotExamined
from ..rule import Found, rule


@rule(
    "BN402",
    "unfolded",
    summary="A batch normalization that could be folded into the layer beside it costs time in deployment.",
    order=240,
    needs=("graph or file",),
    fix="batchnorm.fold(model, example_inputs)",
    false_alarm="the model is evaluated between epochs and trains on",
)
def unfolded(evidence: Evidence) -> Iterator[Found]:
    if evidence.file is not None:
        if evidence.file.origin == "checkpoint":
            raise NotExamined("needs the model's graph, and a checkpoint holds none")
        for normalization in evidence.file.normalizations:
            if normalization.foldable_into is not None:
                yield _found(normalization.name, normalization.foldable_into)
        return
    if evidence.trains and evidence.layers:
        raise NotExamined("the model is in training mode, not one to deploy")
    if evidence.graph is None:
        return
    for norm, target in foldable(evidence.graph):
        yield _found(norm.name, target.name)


def _found(name: str, layer: str) -> Found:
    return Found(name, f"can be folded into {layer}", {"layer": layer}, severity="info")
