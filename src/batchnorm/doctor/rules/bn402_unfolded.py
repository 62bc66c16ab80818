from __future__ import annotations

from collections.abc import Iterator

from ..facts.facts import Facts, NotExamined
from ..rule import Found, rule


@rule(
    "BN402",
    "unfolded",
    summary="A batch normalization that could be folded into the layer before it costs time in deployment.",
    needs=(),
    fix="batchnorm.fold(model, example_inputs)",
    false_alarm="the model is evaluated between epochs and trains on",
)
def unfolded(facts: Facts) -> Iterator[Found]:
    if facts.file is not None:
        for normalization in facts.file.normalizations:
            if normalization.foldable_into is not None:
                yield _found(normalization.name, normalization.foldable_into)
        return
    lacking = facts.lacks("graph")
    if lacking is not None:
        raise NotExamined(lacking)
    if facts.trains and facts.layers:
        raise NotExamined("the model is in training mode, not one to deploy")
    assert facts.graph is not None
    seen: set[int] = set()
    for layer, norm in facts.graph.directly_normalized():
        owner = norm.owner
        known = owner is not None and owner.running_mean is not None
        if known and id(owner) not in seen and len(layer.users) == 1:
            seen.add(id(owner))
            yield _found(norm.name, layer.name)


def _found(name: str, layer: str) -> Found:
    return Found(name, f"can be folded into {layer}", {"layer": layer}, severity="info")
