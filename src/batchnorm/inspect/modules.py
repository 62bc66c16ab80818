"""Which modules are layers, which are batch normalizations, and where their channels lie."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..errors import UserError
from .nests import modules_in

__all__ = [
    "LAYERS",
    "channel_axis",
    "is_dropout",
    "is_layer",
    "is_norm",
    "is_replaced",
    "names_of",
    "names_of_tensors",
    "norms_out_of_reach",
    "out_features",
    "refuse_lazy",
    "spatial_dims",
    "unregistered_modules",
]

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The first dotted name of each module; the root's is ''."""
    return {module: name for name, module in model.named_modules()}


def names_of_tensors(model: nn.Module) -> dict[int, str]:
    """The first dotted names of parameters and buffers, by `id`."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[int, str] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), name)
    return names


def refuse_lazy(model: nn.Module, what: str) -> None:
    """Refuse a model with a normalization that has not seen its first batch: it has no vectors of any size yet.

    Raises:
        UserError: names the layer; `what` names the caller.
    """
    for name, module in model.named_modules():
        held = (*module._parameters.values(), *module._buffers.values()) if is_norm(module) else ()
        if any(nn.parameter.is_lazy(tensor) for tensor in held if tensor is not None):
            raise UserError(
                f"{what}: {name or 'the model'} is a {type(module).__name__} that does not know its size yet; run the "
                "model once on a batch first"
            )


def unregistered_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that the model holds in a plain list, a dict or an object, and their names: no walk over the model
    finds them, nor does `.train()`."""
    found: dict[nn.Module, str] = {}
    known = set(model.modules())
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            for held in modules_in(value) if attribute != "_modules" else ():
                for inside, part in held.named_modules():
                    if part not in known:
                        found.setdefault(part, ".".join(filter(None, (name, attribute, inside))))
    return found


def norms_out_of_reach(model: nn.Module) -> dict[str, str]:
    """The names of batch normalizations that no tool can change, and why."""
    scripted = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    found = {n: "a TorchScript module" for n, m in scripted if "BatchNorm" in str(getattr(m, "original_name", ""))}
    held = unregistered_modules(model).items()
    return found | {name: "not registered as a submodule" for module, name in held if is_norm(module)}


def is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, or a compiled one, which is bound to it and to its class."""
    return "forward" in module.__dict__ or module._compiled_call_impl is not None


def is_layer(module: nn.Module) -> bool:
    """True for a Conv, ConvTranspose or Linear, subclasses included."""
    return isinstance(module, LAYERS)


def is_norm(module: nn.Module) -> bool:
    """True for a batch normalization: torch's own, `SyncBatchNorm`, ours, and their subclasses."""
    return isinstance(module, _BatchNorm)


def is_dropout(module: nn.Module) -> bool:
    """True for torch's dropouts of every kind, and their subclasses."""
    return isinstance(module, _DropoutNd)


def out_features(layer: nn.Module) -> int:
    """How many channels the layer's result has."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]  # nn.Module types every attribute as Tensor | Module


def spatial_dims(layer: nn.Module) -> int:
    """1, 2 or 3 for a convolution, 0 for a Linear."""
    if isinstance(layer, nn.Linear):
        return 0
    return len(layer.kernel_size)  # type: ignore[arg-type]  # as above


def channel_axis(module: nn.Module, dims: int) -> int | None:
    """The axis of a layer's or a normalization's input or result of `dims` dimensions that holds the channels: the last
    one for a Linear, for a convolution the one before the spatial axes (0 where there is no batch axis), for a
    normalization its second or `feature_axis`; None where there is no such axis."""
    if is_norm(module):
        axis = int(getattr(module, "feature_axis", 1))
        return axis % dims if dims > 1 and -dims <= axis < dims else None
    axis = dims - 1 - spatial_dims(module)
    return axis if axis >= 0 else None
