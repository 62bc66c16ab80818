"""What is measured inside a network: the input of the last hidden activation, γ and β, the normalization layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ...inspect.from_run import graph_of_run
from ...inspect.modules import is_layer, is_norm, names_of
from ...inspect.untouched import modes_and_buffers_kept
from .arms import DynamicTanh, RmsOfSample

LEVELS = (15, 50, 85)  # the percentiles of the paper's Figure 1
UNITS = 8
PROBE_SAMPLES = 256

_NORMS = (
    nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm,
    RmsOfSample, DynamicTanh,
)  # fmt: skip
_NO_ACTIVATION = {"MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax"}
_ACTIVATIONS = tuple(
    getattr(nn, name) for name in nn.modules.activation.__all__ if name not in _NO_ACTIVATION and hasattr(nn, name)
)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a layer, activation or normalization while the network ran on an example."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]


def trace_calls(model: nn.Module, example: Tensor) -> list[ModuleCall]:
    """Return the calls of layers, activations and normalizations in the order in which the network made them."""
    calls: list[ModuleCall] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: calls.append(ModuleCall(name, module, tuple(args[0].shape)))

    with ExitStack() as stack, modes_and_buffers_kept(model):
        model.eval()
        for module, name in names_of(model).items():
            if is_layer(module) or isinstance(module, (*_ACTIVATIONS, *_NORMS)):
                stack.enter_context(module.register_forward_pre_hook(note(name)))
        model(example)
    return calls


def hidden_calls(model: nn.Module, example: Tensor) -> list[ModuleCall]:
    """Return the calls before that of the output layer, the last where there are several."""
    outputs = graph_of_run(model, example, "study").output_layers()
    calls = trace_calls(model, example)
    last = max((k for k, call in enumerate(calls) if call.module in outputs), default=0)
    return calls[:last]


def use_batch_statistics(model: nn.Module) -> None:
    """Let the network compute as in training, but without dropout.

    The paper's Figure 1 is about what the units are fed while they learn; the running averages start at (0, 1)
    and would show their own warming-up instead.
    """
    model.eval()
    for module in model.modules():
        if is_norm(module):
            module.training = True


class Probe:
    """Percentiles of hidden units' pre-activations over one fixed batch.

    The place is the input of the last hidden activation module; where a network calls its activations as
    functions, the output of its last hidden normalization or layer, which is the same tensor. Up to 8 units,
    spread evenly over the layer; all positions of a feature map count as values of one unit.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._x = x[:PROBE_SAMPLES]
        calls = hidden_calls(model, x[:2])
        activations = [call for call in calls if isinstance(call.module, _ACTIVATIONS)]
        self._at_input = bool(activations)
        sites = activations or calls
        self.site = sites[-1] if sites else None
        layers = [call.module for call in calls if is_layer(call.module)]
        self._channels_last = bool(layers) and isinstance(layers[-1], nn.Linear)
        self.units: list[int] = []

    @property
    def layer(self) -> str | None:
        """Return the place's name in the network, None for a network without hidden layers."""
        return self.site.name if self.site else None

    def percentiles(self, model: nn.Module) -> list[list[float]]:
        """Return (units, levels) for the network as it is now; nothing of it is changed."""
        if self.site is None:
            return []
        seen: list[Tensor] = []
        if self._at_input:
            hook = self.site.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        else:
            hook = self.site.module.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        with hook, modes_and_buffers_kept(model):
            use_batch_statistics(model)
            model(self._x)
        value = seen[-1].movedim(-1 if self._channels_last else 1, -1).flatten(0, -2)
        if not self.units:
            width = value.shape[-1]
            self.units = np.unique(np.linspace(0, width - 1, min(UNITS, width)).round().astype(int)).tolist()
        levels = np.percentile(value[:, self.units].double().numpy(), LEVELS, axis=0).T
        return [[float(f"{v:.5g}") for v in unit] for unit in levels]

    def to_json(self, values: list[list[list[float]]]) -> dict[str, Any]:
        """Return the trace's `percentiles` entry; `values` is (evaluations, units, levels)."""
        return {"layer": self.layer, "units": self.units, "levels": list(LEVELS), "values": values}


def drift_of_run(values: ArrayLike) -> float:
    """Return how far a typical hidden unit's percentiles wander during a run, in units of the unit's spread.

        drift = median over units u of  √( mean over t and levels p of (v[t,u,p] − v̄[u,p])² ) / S[u]
        v̄[u,p] = mean over t of v[t,u,p],   S[u] = mean over t of v[t,u,last] − v[t,u,first]

    Zero for a unit that stays where it is, unchanged when a unit's values are shifted or scaled.

    Args:
        values: shape (T, U, 3): the 15th, 50th and 85th percentile of U units' pre-activations at T evaluations.

    Returns:
        The drift; NaN where it has none: fewer than two evaluations with finite values, or no unit with a spread.

    Raises:
        ValueError: another shape.

    Source: the quantity drawn in Figure 1(b, c) of Ioffe & Szegedy (2015); the number is this library's own.
    """
    path = np.asarray(values, dtype=np.float64)
    if path.ndim != 3 or path.shape[2] < 2:
        raise ValueError(f"percentiles have shape (evaluations, units, levels), not {path.shape}")
    path = path[np.isfinite(path).all(axis=(1, 2))]
    if len(path) < 2:
        return float("nan")
    # The values are scaled first, because squares of a diverging run's values would overflow.
    scale = np.abs(path).max(axis=(0, 2))
    path = path[:, scale > 0] / scale[scale > 0, None]
    spread = (path[:, :, -1] - path[:, :, 0]).mean(axis=0)
    wander = path.std(axis=0)
    alive = spread > 1e-12
    if not alive.any():
        return float("nan")
    return float(np.median(np.sqrt((wander[alive] ** 2).mean(axis=1)) / spread[alive]))


def affine_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """Return γ and β of every normalization layer that has them, to five digits."""

    def rounded(parameter: Tensor | None) -> list[float] | None:
        return None if parameter is None else [float(f"{v:.5g}") for v in parameter.detach().flatten().tolist()]

    return [
        {"layer": name, "weight": rounded(module.weight), "bias": rounded(getattr(module, "bias", None))}
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and module.weight is not None
    ]


def layer_table(model: nn.Module, example: Tensor, batch_size: int) -> list[dict[str, Any]]:
    """Return a line for each normalization layer: name, kind, features, positions and m.

    m is how many values go into one mean and variance: batch · width · height for batch normalization,
    and what takes its place for the others.
    """
    table = []
    for call in trace_calls(model, example):
        module = call.module
        if not isinstance(module, _NORMS):
            continue
        features = int(getattr(module, "num_features", 0) or getattr(module, "num_channels", 0) or 0)
        if not features:
            features = call.shape[-1] if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else call.shape[1]
        positions = math.prod(call.shape) // (features * len(example))
        if isinstance(module, nn.GroupNorm):
            kind, m = f"GroupNorm({module.num_groups})", features // module.num_groups * positions
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            kind, m = type(module).__name__, math.prod(module.normalized_shape)
        elif isinstance(module, (RmsOfSample, DynamicTanh)):
            kind, m = type(module).__name__, features * positions if isinstance(module, RmsOfSample) else 1
        else:
            kind = type(module).__name__
            samples = getattr(module, "ghost_batch_size", None) or batch_size
            m = positions * (samples if is_norm(module) else 1)
        table.append({"name": call.name, "kind": kind, "features": features, "positions": positions, "m": m})
    return table
