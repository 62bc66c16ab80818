from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..change import Change, RepairContext
from ..diagnosis import Finding
from ..evidence.needs import Evidence
from ..rule import Found, rule


@torch.no_grad()
def move_bias(context: RepairContext, finding: Finding) -> list[Change]:
    """Move the bias into the running mean and hold it at 0, so that the state file keeps its keys."""
    layer, norm = context.module(finding.module), context.module(str(finding.evidence["normalized_by"]))
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, nn.Parameter) or norm is None:
        return []
    largest = float(bias.abs().max())
    mean = getattr(norm, "running_mean", None)
    if isinstance(mean, Tensor) and mean.shape == bias.shape:
        mean.sub_(bias.to(mean.dtype))
    bias.zero_()
    bias.requires_grad_(False)
    held = "{}.bias.requires_grad_(False)"
    return [
        Change(finding.code, finding.module, "bias, into the running mean", f"up to {largest:.3g}", "0, held", held)
    ]


@rule(
    "BN101",
    "redundant-bias",
    summary="A Conv or Linear has a bias right before a batch normalization, which subtracts it again.",
    order=220,
    needs=("graph",),
    fix="build the layer with bias=False",
    false_alarm="the normalization will be frozen or taken out, so that the bias reaches the next layer",
    repair=move_bias,
)
def redundant_bias(evidence: Evidence) -> Iterator[Found]:
    assert evidence.graph is not None
    seen: set[int] = set()
    for layer, norm in evidence.graph.directly_normalized():
        bias, owner = layer.bias, evidence.layer_of(norm)
        if not isinstance(bias, nn.Parameter) or id(bias) in seen or (owner is not None and owner.frozen):
            continue
        if not bias.requires_grad and not nn.parameter.is_lazy(bias) and not bias.any():
            continue  # it is held at 0, so nothing is lost
        seen.add(id(bias))
        weight = next(iter(layer.tensors), "")  # of a layer that is called as a function
        yield Found(
            weight.removesuffix("weight").removesuffix(".") or layer.name,
            f"its bias is subtracted again by {norm.name} with the batch's mean and gets no gradient",
            {"parameters": 0 if nn.parameter.is_lazy(bias) else bias.numel(), "normalized_by": norm.name},
        )
