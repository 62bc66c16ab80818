"""The one decision on what can be folded into what. `fold` acts on it, and the doctor's BN402 asks it.

A normalization can go into the layer before it when it reads that layer's very result, along the same channels, and
nobody else does; or into the layer after it, when that layer alone reads its very result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..pairs import is_ours
from .graph import ELSEWHERE, GraphNode, ModelGraph
from .modules import LAYERS, spatial_dims
from .operators import Effect

__all__ = [
    "FoldTarget",
    "fold_target",
    "foldable",
    "is_transposed",
    "only_normalizes",
    "pads_with_zeros",
    "scale_and_shift",
    "why_not_into",
    "why_stays",
]

_TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_LAYER_FORWARDS = {kind.forward for kind in LAYERS}


class FoldTarget(NamedTuple):
    """The layer that a normalization can go into, and on which side of it; or None, and why it stays."""

    layer: GraphNode | None
    before: bool
    reason: str


def only_normalizes(norm: Any) -> bool:
    """Whether the module's forward is torch's or ours: another library's may do more."""
    return is_ours(norm) or type(norm).forward in _TORCH_FORWARDS


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """(s, t) of a batch normalization in evaluation, y = s·x + t, as float64 numbers."""
    s = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        s = s * norm.weight.detach().double()
    t = -norm.running_mean.double() * s
    return s, t if norm.bias is None else t + norm.bias.detach().double()


def is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def why_stays(norm: Any, graph: ModelGraph) -> str:
    """Why a batch normalization module cannot be taken out at all, or ''."""
    calls = graph.calls_of(norm)
    if norm.training:
        return "in training mode; call model.eval() first"
    if norm.running_mean is None:
        return "keeps no running statistics"
    if not only_normalizes(norm):
        return f"{type(norm).__module__}.{type(norm).__qualname__} may do more than normalize"
    if getattr(norm, "domains", None) is not None:
        return "its statistics depend on the domain"
    if parametrize.is_parametrized(norm):
        return "its γ or β is parametrized"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it has forward hooks"
    if not calls:
        return "the example does not reach it"
    return "called more than once" if len(calls) > 1 else ""


def fold_target(
    norm: GraphNode,
    graph: ModelGraph,
    changed: Collection[GraphNode | nn.Module | None],
    why_not_after: Callable[[GraphNode], str],
) -> FoldTarget:
    """Where a normalization that need not stay goes.

    Args:
        norm: its one call.
        graph: what calls what.
        changed: layers that have taken part in a fold since the graph was read; they are left for the next reading.
        why_not_after: why the normalization's numbers cannot be folded into the layer that reads its result, or ''.
    """
    before, why_not_before = _layer_before(norm, graph)
    if before is not None and before.module not in changed:
        return FoldTarget(before, True, "")
    after, why_not_after_it = _layer_after(norm, graph)
    if after is None or after.module in changed:
        reason = f"{why_not_before}; {why_not_after_it}" if before is None else "its layer was changed in this round"
        return FoldTarget(None, False, reason)
    why_not = why_not_after(after)
    return FoldTarget(None, False, f"{why_not_before}; {why_not}") if why_not else FoldTarget(after, False, "")


def foldable(graph: ModelGraph) -> Iterator[tuple[GraphNode, FoldTarget]]:
    """Yield every normalization of the graph that can be folded as it stands, and where it goes."""
    for norm in graph.calls:
        if norm.effect is not Effect.NORM or norm.stays or (norm.module is not None and why_stays(norm.module, graph)):
            continue
        target = fold_target(norm, graph, (), partial(_why_not_module, norm.module))
        if target.layer is not None:
            yield norm, target


def _why_not_module(norm: Any, layer: GraphNode) -> str:
    return why_not_into(layer.module, *scale_and_shift(norm)) if norm is not None else "no layer reads its result"


def _layer_before(call: GraphNode, graph: ModelGraph) -> tuple[GraphNode | None, str]:
    source = call.source
    if source is None or source.effect is not Effect.LAYER:
        return None, "it does not read a layer's result"
    if not call.aligned:
        return None, f"it normalizes another axis than the channels of {source.name}"
    layer, why_not = _only_reader(source, call.name, graph, source)
    return (None, source.stays_before) if layer is not None and source.stays_before else (layer, why_not)


def _layer_after(call: GraphNode, graph: ModelGraph) -> tuple[GraphNode | None, str]:
    reader = next((c for c in graph.calls if c.source is call), None)
    if reader is None or reader.effect is not Effect.LAYER:
        return None, "no layer reads its result"
    if not reader.aligned:
        return None, f"its channels are not those of {reader.name}'s input"
    return _only_reader(call, reader.name, graph, reader)


def _only_reader(read: GraphNode, reader: str, graph: ModelGraph, layer: GraphNode) -> tuple[GraphNode | None, str]:
    others = [name for name in read.readers if name != reader]
    if others:
        where = ELSEWHERE if ELSEWHERE in others else f"by {others[0] or 'the model'}"
        return None, f"the result of {read.name} is also read {where}"
    why_not = layer.stays or _why_layer_stays(layer, graph)
    return (None, why_not) if why_not else (layer, "")


def _why_layer_stays(call: GraphNode, graph: ModelGraph) -> str:
    """Why a layer module's weight cannot be changed, or ''."""
    layer: Any = call.module
    if layer is None:
        return ""
    if type(layer).forward not in _LAYER_FORWARDS:
        return f"{call.name} is a {type(layer).__qualname__} with a forward of its own"
    if len(graph.calls_of(layer)) > 1:
        return f"{call.name} is called more than once"
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return f"{call.name} computes its weight"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return f"{call.name} has forward hooks"
    return f"{call.name} shares its weight" if call.parameters_shared else ""


def pads_with_zeros(layer: Any) -> bool:
    """Whether a convolution reads zeros around its input."""
    if is_transposed(layer) or spatial_dims(layer) == 0 or layer.padding_mode != "zeros":
        return False
    return any(layer._reversed_padding_repeated_twice)


def why_not_into(layer: Any, s: Tensor, t: Tensor) -> str:
    """Why y = s·x + t cannot be folded into the layer module that reads y, or ''."""
    if is_transposed(layer) and t.any():
        return "the ConvTranspose after it gives every position another share of the shift"
    if pads_with_zeros(layer) and torch.any((s == 0) & (t != 0)):
        return "the layer after it pads with zeros, which a channel with γ = 0 cannot have come from"
    return ""
