"""Records the graph of one observed forward: which operation read whose result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ...inspect.from_run import tensors_in
from .model_graph import Graph, Node
from .normalizations import Layer

__all__ = ["Recorder"]

_CONVOLUTIONS = {
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
_FEATURES_LAST = {F.linear, F.embedding, F.layer_norm, F.multi_head_attention_forward, torch.lstm, torch.gru}
_SWAPS = {torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, torch.swapdims, Tensor.swapdims}
_PERMUTES = {torch.permute, Tensor.permute}
_SHUFFLES = {torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis, torch.t, Tensor.t}


class Recorder:
    """Notes operations while one forward runs. `graph` is complete after `finish`."""

    def __init__(self, parameter_names: dict[int, str]) -> None:
        self.graph = Graph()
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._names = parameter_names

    def note(self, func: Any, args: Any, kwargs: Any, output: Any, scope: str, module: nn.Module | None) -> None:
        """Note any operation but a batch normalization or a dropout."""
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not results:
            return
        if func in _CONVOLUTIONS or func is F.linear:
            self._note_layer(func, args, kwargs, results[0], scope, module)
            return
        sources = tensors_in((args, kwargs))
        inputs = self._nodes(sources)
        if not inputs and func not in _FEATURES_LAST:
            return
        node = Node("other", scope or getattr(func, "__name__", ""), inputs, shape=tuple(results[0].shape))
        node.feature_axis = _feature_axis(func, args, kwargs, inputs, results[0])
        self._add(node, results)

    def note_dropout(self, input: Tensor, output: Tensor, p: float, name: str) -> None:
        node = Node("dropout", name, self._nodes([input]), p=p, shape=tuple(output.shape))
        node.feature_axis = node.inputs[0].feature_axis if node.inputs else None
        self._add(node, [output])

    def note_batch_norm(self, input: Tensor, output: Tensor, layer: Layer, axis: int) -> None:
        """`axis`: the one that the layer normalizes over, as it was told."""
        node = Node("batch_norm", layer.name, self._nodes([input]), owner=layer, shape=tuple(input.shape))
        source = node.inputs[0].feature_axis if node.inputs else None
        told = axis % input.dim() == source if source is not None and input.dim() > 1 else False
        node.feature_axis = 1 if told else source
        self._add(node, [output])

    def finish(self, output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor in self._made:
                self._made[tensor].is_output = True

    def _note_layer(
        self, func: Any, args: Any, kwargs: Any, output: Tensor, scope: str, module: nn.Module | None
    ) -> None:
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        weight, bias = named.get("weight"), named.get("bias")
        own = module is not None and getattr(module, "weight", None) is weight
        name = scope if own else self._names.get(id(weight), f"{scope}.{func.__name__}")
        node = Node(
            "linear" if func is F.linear else "conv",
            name,
            self._nodes([named["input"]]),
            owner=module if own else weight,
            shape=tuple(output.shape),
            bias=bias if isinstance(bias, nn.Parameter) else None,
            feature_axis=output.dim() - 1 if func is F.linear else 1,
        )
        self._add(node, [output])

    def _nodes(self, tensors: list[Tensor]) -> list[Node]:
        return list(dict.fromkeys(self._made[t] for t in tensors if t in self._made))

    def _add(self, node: Node, outputs: list[Tensor]) -> None:
        node.link()
        self.graph.nodes.append(node)
        for tensor in outputs:
            self._made[tensor] = node


def _feature_axis(func: Any, args: Any, kwargs: Any, inputs: list[Node], output: Tensor) -> int | None:
    if func in _FEATURES_LAST:
        return output.dim() - 1
    source = next((node for node in inputs if node.feature_axis is not None), None)
    if source is None or source.shape is None:
        return None
    before, axis, dims = source.shape, source.feature_axis, len(source.shape)
    assert axis is not None
    if func in _SWAPS and output.dim() == dims:
        a, b = (int(d) % dims for d in _numbers((args, kwargs)))
        return {a: b, b: a}.get(axis, axis)
    if func in _PERMUTES and output.dim() == dims:
        return [int(d) % dims for d in _numbers((args, kwargs))].index(axis)
    if func in _SHUFFLES:
        return None
    if tuple(output.shape) == before:
        return axis
    if axis == dims - 1 and output.dim() and output.size(-1) == before[-1]:  # sliced, flattened or cut before it
        return output.dim() - 1
    return None


def _numbers(tree: Any) -> list[int]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, int) and not isinstance(leaf, bool)]
