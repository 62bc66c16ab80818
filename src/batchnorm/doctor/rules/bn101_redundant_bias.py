from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..facts.facts import Facts
from ..rule import Found, rule


@rule(
    "BN101",
    "redundant-bias",
    summary="A Conv or Linear has a bias right before a batch normalization, which subtracts it again.",
    needs=("graph",),
    fix="build the layer with bias=False",
    false_alarm="the normalization will be frozen or taken out, so that the bias reaches the next layer",
)
def redundant_bias(facts: Facts) -> Iterator[Found]:
    assert facts.graph is not None
    seen: set[int] = set()
    for layer, norm in facts.graph.directly_normalized():
        bias = layer.bias
        if bias is None or norm.owner is None or id(bias) in seen or not getattr(norm.owner, "live", False):
            continue
        if layer.shape is not None and layer.feature_axis != 1:  # the normalization is over other features
            continue
        if not bias.requires_grad and not nn.parameter.is_lazy(bias) and not bias.any():
            continue  # held at zero: nothing is learned or lost
        seen.add(id(bias))
        yield Found(
            layer.name,
            f"its bias is subtracted again by {norm.name} with the batch's mean and gets no gradient",
            {"parameters": 0 if nn.parameter.is_lazy(bias) else bias.numel(), "normalized_by": norm.name},
        )
