"""The one decision on what can be folded into what. `fold` acts on it, and the doctor's BN402 asks it.

A normalization can go into the layer before it when it reads that layer's very result, along the same channels, and
nobody else does; or into the layers after it, when these alone read its very result. Where it is called several times,
this has to hold of every call, and nothing else may call these layers: f(a) − f(b) with f = (layer, norm).
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
from .graph import ELSEWHERE, KEPT, GraphNode, ModelGraph
from .modules import LAYERS, is_replaced, spatial_dims
from .operators import Effect

__all__ = [
    "FoldTarget",
    "fold_target",
    "foldable",
    "is_transposed",
    "only_normalizes",
    "pads_with_zeros",
    "per_channel_read",
    "scale_and_shift",
    "why_not_into",
    "why_stays",
]

_Find = Callable[[GraphNode, ModelGraph], tuple[list[GraphNode], str]]
_TORCH_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_LAYER_FORWARDS = {kind.forward for kind in LAYERS}


class FoldTarget(NamedTuple):
    """The layers that a normalization can go into, by a call of each, and on which side; or none, and why it stays."""

    layers: tuple[GraphNode, ...]
    before: bool
    reason: str

    @property
    def layer(self) -> GraphNode | None:
        """The first of them."""
        return self.layers[0] if self.layers else None

    @property
    def name(self) -> str:
        return ", ".join(layer.name for layer in self.layers)


def only_normalizes(norm: Any) -> bool:
    """Whether the module's forward is torch's or ours: another library's may do more."""
    return is_ours(norm) or getattr(type(norm), "forward", None) in _TORCH_FORWARDS


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
    if is_replaced(norm):
        return "it has a forward of its own"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it has forward hooks"
    if graph.undecided:
        return graph.undecided
    return "" if calls else "the example does not reach it"


def fold_target(
    norm: GraphNode,
    graph: ModelGraph,
    changed: Collection[GraphNode | nn.Module | None],
    why_not_after: Callable[[GraphNode], str],
) -> FoldTarget:
    """Where a normalization that need not stay goes.

    Args:
        norm: a call of it.
        graph: what calls what.
        changed: layers that have taken part in a fold since the graph was read; they are left for the next reading.
        why_not_after: why the normalization's numbers cannot be folded into the layer that reads its result, or ''.
    """
    calls = [norm] if norm.module is None else graph.calls_of(norm.module)
    before, why_not_before = _beside_every(calls, graph, _layer_before)
    if before and not any(layer.module in changed for layer in before):
        return FoldTarget(before, True, "")
    after, why_not_after_it = _beside_every(calls, graph, _layers_after)
    if not after or any(layer.module in changed for layer in after):
        reason = "its layer was changed in this round" if before else f"{why_not_before}; {why_not_after_it}"
        return FoldTarget((), False, reason)
    why_not = next(filter(None, map(why_not_after, after)), "")
    return FoldTarget((), False, f"{why_not_before}; {why_not}") if why_not else FoldTarget(after, False, "")


def per_channel_read(layer: GraphNode, *vectors: Tensor) -> list[Tensor]:
    """Vectors of the normalization's channels, as one value for each channel of the input of a layer after it."""
    return [v[list(layer.spread)] if layer.spread else v for v in vectors]


def foldable(graph: ModelGraph) -> Iterator[tuple[GraphNode, FoldTarget]]:
    """Yield every normalization of the graph that can be folded as it stands, and where it goes."""
    for norm in {call.identity: call for call in graph.calls}.values():  # each once, however often it is called
        if norm.effect is not Effect.NORM or norm.stays or (norm.module is not None and why_stays(norm.module, graph)):
            continue
        target = fold_target(norm, graph, (), partial(_why_not_module, norm.module))
        if target.layer is not None:
            yield norm, target


def _why_not_module(norm: Any, layer: GraphNode) -> str:
    if norm is None:
        return "no layer reads its result"
    return why_not_into(layer.module, *per_channel_read(layer, *scale_and_shift(norm)))


def _beside_every(calls: list[GraphNode], graph: ModelGraph, find: _Find) -> tuple[tuple[GraphNode, ...], str]:
    """A call of each layer beside the normalization's calls; none, and the reason, where one call has no such layer, or
    such a layer is called for something else too."""
    found: list[GraphNode] = []
    for call in calls:
        layers, why_not = find(call, graph)
        why_not = why_not or next(filter(None, (layer.stays or _why_layer_stays(layer) for layer in layers)), "")
        if why_not:
            return (), f"called more than once, and in one call {why_not}" if len(calls) > 1 else why_not
        found += layers
    for layer in found:
        siblings = [layer] if layer.module is None else graph.calls_of(layer.module)
        if any(call not in found for call in siblings):
            return (), f"{layer.name} is called more than once"
    return tuple({layer.identity: layer for layer in found}.values()), ""


def _layer_before(call: GraphNode, _: ModelGraph) -> tuple[list[GraphNode], str]:
    source = call.source
    if source is None or source.effect is not Effect.LAYER:
        return [], "it does not read a layer's result"
    if not source.is_call:
        return [], f"it does not read a layer's result but that of a function, {source.name}"
    if not call.aligned:
        return [], f"it normalizes another axis than the channels of {source.name}"
    return [source], _why_read_elsewhere(source, [call]) or source.stays_before


def _layers_after(call: GraphNode, graph: ModelGraph) -> tuple[list[GraphNode], str]:
    readers = [node for node in graph.calls if node.source is call and node.effect is Effect.LAYER]
    if not readers:
        return [], "no layer reads its result"
    for reader in readers:
        if not reader.aligned and not reader.spread:
            return [], f"its channels are not those of {reader.name}'s input"
        siblings = graph.calls_of(reader.module) if reader.module is not None else ()
        if any(other.spread != reader.spread for other in siblings):
            return [], f"{reader.name} is called more than once, with its channels in other places"
    return readers, _why_read_elsewhere(call, readers)


def _why_read_elsewhere(read: GraphNode, readers: list[GraphNode]) -> str:
    """Why not these alone read the result, or ''."""
    expected = {reader.identity for reader in readers}
    others = [reader for reader in read.readers if reader.identity not in expected]
    if not others:
        return ""
    if KEPT in others:
        return f"the result of {read.name} is also read elsewhere: something holds it when the forward is over"
    where = ELSEWHERE.name if ELSEWHERE in others else f"by {others[0].name or 'the model'}"
    return f"the result of {read.name} is also read {where}"


def _why_layer_stays(call: GraphNode) -> str:
    """Why a layer module's weight cannot be changed, or ''."""
    layer: Any = call.module
    if layer is None:
        return ""
    if getattr(type(layer), "forward", None) not in _LAYER_FORWARDS:  # a ScriptModule's class has none
        return f"{call.name} is a {type(layer).__qualname__} with a forward of its own"
    if is_replaced(layer):
        return f"{call.name} has a forward of its own"
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
