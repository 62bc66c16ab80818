"""When a normalization and the activation after it run as one operator: while nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as all_modules

from .layers import BatchNormBase

__all__ = ["MODULES", "is_ours", "known_activation", "make_activation"]

# The modules whose result the operators compute: exact types, since a subclass may compute something else.
MODULES: dict[type, str] = {
    nn.Identity: "",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
_TYPES = {word: kind for kind, word in MODULES.items()}
_FORWARD: Callable[..., Any] = BatchNormBase.forward


def make_activation(activation: str | None, negative_slope: float) -> nn.Module:
    """The module that computes an activation of this name."""
    module: nn.Module = _TYPES[activation or ""](*((negative_slope,) if activation == "leaky_relu" else ()))
    return module


def known_activation(activation: Any, *beside: Any) -> tuple[str, float] | None:
    """The operators' name and slope of what the module computes, where nobody notices that it is not called: neither it
    nor a module `beside` it has a hook, a wrapper or a parametrization.

    Asked at each call, since all of it may change in between; one function, since small tensors feel every call.
    """
    word = MODULES.get(type(activation))
    if word is None:
        return None
    for module in (activation, *beside):
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
            or "forward" in module.__dict__
            or "parametrizations" in module._modules
        ):
            return None
    if (
        all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    ):
        return None
    if word == "relu6" and (activation.min_val, activation.max_val) != (0.0, 6.0):
        return None
    return word, activation.negative_slope if word == "leaky_relu" else 0.01


def is_ours(module: Any) -> bool:
    """Whether a call of the module computes one of our layers and nothing else."""
    return getattr(type(module), "forward", None) is _FORWARD
