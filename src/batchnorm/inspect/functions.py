"""Layers, normalizations and dropouts that a model calls as functions: which they are, and what they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..functional import batch_norm
from .graph import GraphNode
from .operators import Effect, effect_of, operator_name

__all__ = ["FunctionCalls", "describe", "effect_of_function", "features_last", "in_eval"]

# Names by position, as far as they are asked for. torch.batch_norm and F.batch_norm agree in these two.
_ARGUMENTS = {
    Effect.LAYER: ("input", "weight", "bias"),
    Effect.NORM: ("input", "", "", "", "", "training"),
    Effect.DROPOUT: ("input", "p", "training", "inplace"),
}
_FEATURES_LAST = {"embedding", "layer_norm", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"}


def effect_of_function(function: Any) -> Effect:
    """What a call of the function is; OTHER where it is no convolution, linear map, normalization or dropout."""
    if function is batch_norm:
        return Effect.NORM
    name = operator_name(function)
    effect = effect_of(name)
    has_bias = name == "linear" or name.startswith("conv")
    return Effect.OTHER if effect not in _ARGUMENTS or (effect is Effect.LAYER and not has_bias) else effect


def features_last(function: Any) -> bool:
    """Whether the last axis of the function's result holds the features, whatever it was given."""
    return operator_name(function) in _FEATURES_LAST


def describe(node: GraphNode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Note what the call says of itself, and return its arguments by name, as far as they are asked for."""
    given = {**dict(zip(_ARGUMENTS[node.effect], args, strict=False)), **kwargs}
    if node.effect is Effect.DROPOUT:
        p = given.get("p", 0.5)
        node.p = float(p) if isinstance(p, (int, float)) else 0.0
    elif node.effect is Effect.NORM:
        node.axis = given.get("feature_axis", 1)
        node.by_batch = given.get("training", False) is not False
    else:
        node.stays = f"{node.name} is called as a function"
        weight = given.get("weight")
        node.axis = 1 - weight.dim() if isinstance(weight, Tensor) else None  # before the spatial axes
    return given


def in_eval(dropout: Mapping[str, Any]) -> Tensor:
    """What a dropout with these arguments hands on in evaluation, as a tensor of its own where it is not in place."""
    given: Tensor = dropout["input"]
    return given if dropout.get("inplace", False) else given.clone()


class FunctionCalls(TorchFunctionMode):
    """Lets `call(function, args, kwargs)` run every function that the graph knows by its name."""

    def __init__(self, call: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if effect_of_function(func) is Effect.OTHER and not features_last(func):
            return func(*args, **(kwargs or {}))
        return self._call(func, args, kwargs or {})
