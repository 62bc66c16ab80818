"""The batch normalizations of a model: torch's modules and ours, frozen look-alikes, and functional calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ...inspect.graph import ModelGraph
from ...inspect.modules import is_dropout, is_norm
from ...inspect.operators import Effect
from ...model_tools.freeze import is_frozen

__all__ = ["Layer", "find_layers", "layers_of_trace", "model_trains"]


@dataclass(eq=False)
class Layer:
    """One batch normalization. `frozen`: it is held at its running statistics on purpose. A layer that is not frozen
    takes batch statistics, or would when the model trains."""

    name: str
    module: nn.Module | None
    kind: str  # "module", "sync", "look-alike" or "functional"
    eps: float
    momentum: float | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool = False
    frozen: bool = False
    num_batches_tracked: Tensor | None = None
    num_features: int = 0

    @property
    def tracks(self) -> bool:
        """There are running statistics, and they hold values."""
        buffers = (self.running_mean, self.running_var)
        return all(b is not None and not is_lazy(b) and b.device.type != "meta" for b in buffers)

    @property
    def is_initial(self) -> bool:
        """The running statistics are those of a new layer: means 0, variances 1."""
        if not self.tracks or self.running_mean is None or self.running_var is None:
            return False
        return bool((self.running_mean == 0).all() and (self.running_var == 1).all())

    @property
    def affine(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias) if t is not None and not is_lazy(t)]

    @property
    def affine_is_held(self) -> bool:
        """There are γ and β, and neither of them learns."""
        return bool(self.affine) and not any(t.requires_grad for t in self.affine)


def _is_look_alike(module: nn.Module) -> bool:
    """Return whether a module of another class keeps running statistics, as torchvision's FrozenBatchNorm2d does."""
    held = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return not isinstance(module, (_BatchNorm, _InstanceNorm)) and all(isinstance(t, Tensor) for t in held)


def model_trains(model: nn.Module) -> bool:
    """Return whether the model is in training mode.

    The modules that training changes decide. A new wrapper around an evaluated model has `training=True`, and the mode
    of a frozen normalization is not that of the model.
    """
    flags = [
        module.training
        for module in model.modules()
        if not is_norm(module)
        and not _is_look_alike(module)
        and (is_dropout(module) or any(p is not None for p in module._parameters.values()))
    ]
    if flags:
        return any(flags)
    norms = [module.training for module in model.modules() if is_norm(module)]
    return any(norms) if norms else model.training


def find_layers(model: nn.Module) -> list[Layer]:
    """Return every batch normalization module once, under its first name."""
    trains = model_trains(model)
    others_learn = any(
        p.requires_grad
        for module in model.modules()
        if not is_norm(module)
        for p in module._parameters.values()
        if p is not None
    )
    layers = []
    for name, module in model.named_modules():
        if is_norm(module):
            layers.append(_layer(name, module, trains, others_learn))
        elif _is_look_alike(module):
            layers.append(_look_alike(name, module))
    return layers


def _layer(name: str, module: Any, trains: bool, others_learn: bool) -> Layer:
    layer = Layer(
        name=name,
        module=module,
        kind="sync" if isinstance(module, SyncBatchNorm) else "module",
        eps=module.eps,
        momentum=module.momentum,
        weight=module.weight,
        bias=module.bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        num_batches_tracked=module.num_batches_tracked,
        training=module.training,
        num_features=module.num_features,
    )
    # Evaluation mode holds a layer on purpose where the rest of the model trains, or could.
    held_in_eval = not module.training and (trains or (layer.affine_is_held and others_learn))
    layer.frozen = is_frozen(module) or held_in_eval
    return layer


def _look_alike(name: str, module: Any) -> Layer:
    weight, bias = (
        t if isinstance(t, Tensor) else None for t in (getattr(module, n, None) for n in ("weight", "bias"))
    )
    eps = getattr(module, "eps", 1e-5)
    return Layer(
        name=name,
        module=module,
        kind="look-alike",
        eps=float(eps) if isinstance(eps, (int, float)) else 1e-5,
        momentum=None,
        weight=weight,
        bias=bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        training=module.training,
        frozen=not any(isinstance(t, nn.Parameter) for t in (weight, bias)),
        num_features=module.running_mean.numel(),
    )


def layers_of_trace(graph: ModelGraph) -> list[Layer]:
    """Return the functional calls in a trace, of which only the settings are known."""
    calls = [node for node in graph.of_effect(Effect.NORM) if node.module is None]
    return [
        Layer(call.name, None, "functional", 1e-5, None, None, None, None, None, call.by_batch, not call.by_batch)
        for call in calls
    ]
