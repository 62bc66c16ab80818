"""`Observer`: a forward pass in which every batch normalization is measured, with statistics of the caller's choice.

Layers and functional calls both end in ``batch_norm(input, …)``. A `TorchFunctionMode` intercepts that call, measures
the moments, and calls the function with *fixed* statistics: those of the batch, the running ones, or others. So no
buffer moves, one value per channel does not raise, and nothing is attached to the model.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _hooks
from torch.overrides import TorchFunctionMode

from ...functional import batch_norm
from ...inspect.functions import effect_of_function
from ...inspect.modules import is_norm, names_of_tensors
from ...inspect.operators import Effect
from ...statistics.measured import Measured, mask_over, moments
from .normalizations import Layer, model_trains

__all__ = ["Observer", "Reached", "WrongAxis", "wrong_axis"]

_TORCH_ORDER = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn")
_SIGNATURES = {F.batch_norm: inspect.signature(F.batch_norm), batch_norm: inspect.signature(batch_norm)}
_DROPOUT = inspect.signature(F.dropout)

Moments = dict[int, tuple[Tensor, Tensor]]  # by id of the layer: mean and unbiased variance


class WrongAxis(Exception):
    """A batch normalization was given its features on another axis than 1."""

    def __init__(self, layer: Layer, shape: tuple[int, ...]) -> None:
        super().__init__(layer.name)
        self.layer, self.shape = layer, shape


class Reached(BaseException):
    """The forward came to the layer to stop at. No `except Exception` of the model catches it."""

    def __init__(self, mean: Tensor, var: Tensor, count: int) -> None:
        super().__init__()
        self.moments = (mean, var, count)


def wrong_axis(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Return whether the features lie on another axis than 1: (N, L, C) for a layer of C features, or more axes."""
    if len(shape) < 3 or not layer.num_features or shape[1] == layer.num_features:
        return False
    return len(shape) == 3 or layer.num_features in shape[2:]


class Observer(TorchFunctionMode):
    """Measures one forward after another. `measured` holds the results by the id of the layer.

    `statistics`: "batch", "running" or a dict of fixed moments. Frozen layers use their running statistics, unless they
    are `freed`.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.measured: dict[int, Measured] = {}
        self.statistics: str | Moments = "batch"
        self.freed = False
        self.dropout = False
        self.measuring = True
        self.compared = False  # this batch is also run with dropout on
        self.mask: Tensor | None = None
        self.stop_at: Layer | None = None  # a call of this layer raises `Reached`
        self._model = model
        self._names = {id(m): name for name, m in model.named_modules()}
        self._tensor_names = names_of_tensors(model)
        self._trains = model_trains(model)
        self._flags = {id(m): m.training for m in model.modules()}
        self._stack: list[nn.Module] = []
        self._by_module = {id(layer.module): layer for layer in layers if layer.module is not None}
        self._by_tensor = {
            id(t): layer for layer in layers for t in (layer.running_mean, layer.weight) if t is not None
        }
        self._functional: dict[tuple[str, int], Layer] = {}
        self._ordinals: Counter[str] = Counter()
        self._calls: Counter[int] = Counter()
        self._before_call = 0

    # --- one forward -------------------------------------------------------------------------------------
    def forward(self, call: Callable[[], Any]) -> Any:
        """Run one forward of the model and measure it."""
        self._stack.clear()
        self._ordinals.clear()
        self._calls.clear()
        # Global hooks, because the hook tables of the model belong to the user.
        before = _hooks.register_module_forward_pre_hook(self._enter)
        after = _hooks.register_module_forward_hook(self._leave, always_call=True)
        with before, after, self:
            output = call()
        for key, calls in self._calls.items():
            self.measured[key].calls = max(self.measured[key].calls, calls)
        return output

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._names:
            self._stack.append(module)
            layer = self._by_module.get(id(module))
            if layer is not None and args and isinstance(args[0], Tensor):
                self._before_call = self._calls[id(layer)]
                if getattr(module, "feature_axis", 1) == 1:
                    self._check_axis(layer, args[0])  # before the module checks the dimensions itself

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self._stack or self._stack[-1] is not module:
            return None
        self._stack.pop()
        layer = self._by_module.get(id(module))
        if layer is None or not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
            return None
        if self._calls[id(layer)] != self._before_call:  # its call of batch_norm was met
            return None
        input = _second_axis(args[0], getattr(module, "feature_axis", 1))
        if is_norm(module):  # it normalizes by another operator: only measure it
            self._calls[id(layer)] += 1
            self._measure(self.measured.setdefault(id(layer), Measured()), input, *moments(input), None)
            return None
        return self._look_alike(layer, input, output)

    def _look_alike(self, layer: Layer, input: Tensor, output: Any) -> Tensor | None:
        """Measure a module of another class that multiplies and adds by its running statistics.

        Returns what it would answer with the chosen statistics; None where it keeps its own answer.
        """
        mean, var = layer.running_mean, layer.running_var
        if mean is None or var is None or layer.num_features != input.size(1) or not isinstance(output, Tensor):
            return None
        known = _scaled_by(layer, input, mean, var)
        if output.shape != known.shape or not torch.allclose(output, known, rtol=1e-2, atol=1e-3, equal_nan=True):
            return None
        self._calls[id(layer)] += 1
        batch_mean, batch_var, count = moments(input)
        if layer is self.stop_at:
            raise Reached(batch_mean, batch_var, count)
        self._measure(self.measured.setdefault(id(layer), Measured()), input, batch_mean, batch_var, count, None)
        call = {"running_mean": mean, "running_var": var, "training": False}
        chosen = self._choose(layer, call, batch_mean, batch_var)
        return None if chosen[0] is mean else _scaled_by(layer, input, *chosen)

    # --- one operation -----------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES or func is torch.batch_norm:
            return self._batch_norm(func, args, kwargs)
        if effect_of_function(func) is Effect.DROPOUT:
            return self._dropout(func, args, kwargs)
        return func(*args, **kwargs)

    def _scope(self) -> str:
        return self._names[id(self._stack[-1])] if self._stack else ""

    def _dropout(self, func: Any, args: Any, kwargs: Any) -> Any:
        bound = dict(_DROPOUT.bind(*args, **kwargs).arguments)
        return func(**{**bound, "training": self.dropout and float(bound.get("p", 0.5)) > 0, "inplace": False})

    def _batch_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = _arguments(func, args, kwargs)
        layer = self._layer(call)
        input = _second_axis(call["input"], call.get("feature_axis", 1))
        self._calls[id(layer)] += 1
        seen = self.measured.setdefault(id(layer), Measured())
        if not layer.num_features and layer.module is not None:  # it was lazy until now
            layer.num_features = int(getattr(layer.module, "num_features", 0))
        self._check_axis(layer, input)
        if input.dim() < 2 or layer.num_features != input.size(1):
            return func(*args, **kwargs)  # torch raises and says why
        mask = mask_over(call.get("mask"), input)
        mean, var, count = moments(input, mask)
        if layer is self.stop_at:
            raise Reached(mean, var, count)
        self._measure(seen, input, mean, var, count, call.get("mask"))
        output = _with_fixed(func, call, self._choose(layer, call, mean, var))
        if self.measuring:
            seen.note_range(input)
            seen.note_range(output)
        return output

    def _check_axis(self, layer: Layer, input: Tensor) -> None:
        if wrong_axis(layer, tuple(input.shape)):
            raise WrongAxis(layer, tuple(input.shape))

    def _measure(
        self, seen: Measured, input: Tensor, mean: Tensor, var: Tensor, count: int, own_mask: Tensor | None
    ) -> None:
        if self.dropout:
            seen.dropout_on.add(mean, var, count)
        if not self.measuring:
            return
        seen.add(input, mean, var, count)
        if self.compared:
            seen.dropout_off.add(mean, var, count)
        if own_mask is not None:
            seen.masked_calls += 1
        elif self.mask is not None:
            valid = mask_over(self.mask, input)
            if valid is None:
                # As many rows as valid pixels: the model removed the padding before this layer.
                seen.misfits += int(input.size(0) != int(self.mask.sum()))
            else:
                seen.valid_pixels.add(*moments(input, valid))
                seen.all_pixels.add(mean, var, count)

    def _choose(self, layer: Layer, call: dict[str, Any], mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        running = (call.get("running_mean"), call.get("running_var"))
        if running[0] is None or running[1] is None:
            return mean, var
        if (layer.frozen and not self.freed) or self.statistics == "running":
            return (mean, var) if call.get("training", False) else (running[0], running[1])
        if isinstance(self.statistics, dict):
            return self.statistics.get(id(layer), (running[0], running[1]))
        return mean, var

    # --- which layer -------------------------------------------------------------------------------------
    def _layer(self, call: dict[str, Any]) -> Layer:
        """Return the layer of a call: that of the module around it, that of its tensors, or a new functional one."""
        if self._stack and is_norm(self._stack[-1]):
            return self._by_module[id(self._stack[-1])]
        scope = self._scope()
        key = (scope, self._ordinals[scope])
        self._ordinals[scope] += 1
        tensor = call.get("running_mean") if call.get("running_mean") is not None else call.get("weight")
        if id(tensor) in self._by_tensor:
            return self._by_tensor[id(tensor)]
        if key not in self._functional:
            layer = self._functional_layer(scope, key[1], call)
            self._functional[key] = layer
            self.layers.append(layer)
            self._by_tensor |= {id(t): layer for t in (layer.running_mean, layer.weight) if t is not None}
        return self._functional[key]

    def _functional_layer(self, scope: str, ordinal: int, call: dict[str, Any]) -> Layer:
        training = self._flags[id(self._stack[-1] if self._stack else self._model)]
        vectors = {n: call.get(n) for n in ("weight", "bias", "running_mean", "running_var")}
        named = next((self._tensor_names[id(t)] for t in vectors.values() if id(t) in self._tensor_names), None)
        path = ".".join(part for part in (scope, "batch_norm") if part)
        return Layer(
            name=f"{path}({named})" if named else f"{path}#{ordinal}",
            module=None,
            kind="functional",
            eps=float(call.get("eps", 1e-5)),
            momentum=call.get("momentum", 0.1),
            training=training,
            frozen=self._trains and not training,
            num_features=next((t.numel() for t in vectors.values() if t is not None), call["input"].size(1)),
            **vectors,
        )


def _second_axis(input: Tensor, axis: int) -> Tensor:
    return input if axis == 1 or input.dim() < 2 else input.movedim(axis, 1)


def _scaled_by(layer: Layer, input: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize without `batch_norm`, which the mode would take for a call of the model's."""
    scale = (var.double() + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.double()
    shift = -mean.double() * scale
    shift = shift if layer.bias is None else shift + layer.bias.double()
    shape = (1, -1, *(1,) * (input.dim() - 2))
    return (input.double() * scale.view(shape) + shift.view(shape)).to(input.dtype)


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    if func is torch.batch_norm:
        return dict(zip(_TORCH_ORDER, args, strict=False)) | kwargs
    return dict(_SIGNATURES[func].bind(*args, **kwargs).arguments)


def _with_fixed(func: Any, call: dict[str, Any], statistics: tuple[Tensor, Tensor]) -> Any:
    """Make the same call as in evaluation, with this mean and variance."""
    given = next((call[n] for n in ("running_mean", "weight") if call.get(n) is not None), call["input"])
    mean, var = (t.detach().to(given.dtype) for t in statistics)
    fixed = {**call, "running_mean": mean, "running_var": var, "training": False}
    if func is not batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        fixed = {name: fixed[name] for name in names if name in fixed}
        fixed["momentum"] = 0.0
        return F.batch_norm(**fixed)
    fixed.pop("num_batches_tracked", None)
    return func(**fixed)
