"""The batch normalizations of a model, as they stand: modules of torch's and ours, frozen look-alikes, functional."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ...model_tools.freeze import is_frozen

__all__ = ["Layer", "find_layers", "is_batch_norm", "model_trains", "names_of_tensors"]


@dataclass(eq=False)
class Layer:
    """One batch normalization. `live`: it takes batch statistics, or would when the model trains; `frozen`: it is
    held at its running statistics on purpose."""

    name: str
    module: nn.Module | None
    kind: str  # "module", "sync", "frozen" (a look-alike that never trains), "custom", "functional"
    eps: float
    momentum: float | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None = None
    training: bool = False
    frozen: bool = False
    num_features: int = 0

    @property
    def live(self) -> bool:
        return not self.frozen

    @property
    def tracks(self) -> bool:
        """Running statistics exist, hold values and are of this layer's keeping."""
        buffers = (self.running_mean, self.running_var)
        return all(b is not None and not is_lazy(b) and b.device.type != "meta" for b in buffers)

    @property
    def is_initial(self) -> bool:
        """The running statistics are what a new layer starts with: means 0, variances 1."""
        if not self.tracks or self.running_mean is None or self.running_var is None:
            return False
        return bool((self.running_mean == 0).all() and (self.running_var == 1).all())

    @property
    def affine(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias) if t is not None and not is_lazy(t)]

    @property
    def affine_learns(self) -> bool:
        return any(t.requires_grad for t in self.affine)


def is_batch_norm(module: nn.Module | None) -> TypeGuard[_BatchNorm]:
    """torch's, ours, their Sync and Lazy forms; an instance normalization is none, though it inherits alike."""
    return isinstance(module, _BatchNorm) and not isinstance(module, _InstanceNorm)


def _is_look_alike(module: nn.Module) -> bool:
    """A module of another family that keeps running statistics: torchvision's FrozenBatchNorm2d and its kin."""
    held = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
    return not isinstance(module, (_BatchNorm, _InstanceNorm)) and all(isinstance(t, Tensor) for t in held)


def model_trains(model: nn.Module) -> bool:
    """Whether the model is in training mode, judged by the modules that training changes: a fresh wrapper around an
    evaluated model says `training`, and a frozen normalization says nothing about the model."""
    flags = [
        module.training
        for module in model.modules()
        if not is_batch_norm(module)
        and not _is_look_alike(module)
        and (isinstance(module, _DropoutNd) or any(p is not None for p in module._parameters.values()))
    ]
    if flags:
        return any(flags)
    norms = [module.training for module in model.modules() if is_batch_norm(module)]
    return any(norms) if norms else model.training


def find_layers(model: nn.Module) -> list[Layer]:
    """Returns every batch normalization module once, under its first name."""
    trains = model_trains(model)
    others_learn = any(
        p.requires_grad
        for module in model.modules()
        if not is_batch_norm(module)
        for p in module._parameters.values()
        if p is not None
    )
    layers = []
    for name, module in model.named_modules():
        if is_batch_norm(module):
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
    held = bool(layer.affine) and not layer.affine_learns
    deliberate = trains or (held and others_learn)
    layer.frozen = is_frozen(module) or (not module.training and deliberate)
    return layer


def _look_alike(name: str, module: Any) -> Layer:
    weight, bias = (
        t if isinstance(t, Tensor) else None for t in (getattr(module, n, None) for n in ("weight", "bias"))
    )
    learns = any(isinstance(t, nn.Parameter) for t in (weight, bias))
    eps = getattr(module, "eps", 1e-5)
    return Layer(
        name=name,
        module=module,
        kind="custom" if learns else "frozen",
        eps=float(eps) if isinstance(eps, (int, float)) else 1e-5,
        momentum=None,
        weight=weight,
        bias=bias,
        running_mean=module.running_mean,
        running_var=module.running_var,
        training=module.training,
        frozen=not learns,
        num_features=module.running_mean.numel(),
    )


def names_of_tensors(model: nn.Module) -> dict[int, str]:
    """Dotted names of parameters and buffers, by `id`."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[int, str] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), name)
    return names
