"""Holding batch normalization still: statistics and affine fixed through `.train()`, and back."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..errors import UserError
from ..inspect.modules import is_norm, norms_out_of_reach, refuse_lazy
from .derived import Derived, derived_class, original_class

__all__ = ["freeze", "frozen_class", "is_frozen", "thawed_class", "unfreeze"]


class _Frozen(Derived):
    """A batch normalization that is held in evaluation mode."""

    prefix = "Frozen"
    _mode_asked: bool  # what `.train()` asked for last: the mode after unfreezing
    _before_freezing: dict[str, Any]

    def train(self, mode: bool = True) -> Any:
        super().train(False)  # type: ignore[misc]  # nn.Module's, further along the MRO
        self._mode_asked = mode
        return self


def frozen_class(base: type) -> type:
    """The class of a frozen `base`, named `FrozenBASE`."""
    return derived_class(_Frozen, base)


def thawed_class(kind: type) -> type:
    """The class that a frozen layer had before; a class that is not frozen is returned as it is."""
    return original_class(kind, _Frozen)


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` holds the layer, or one of ours was told so by its flag."""
    return isinstance(module, _Frozen) or getattr(module, "frozen", False) is True


def _affine(norm: nn.Module) -> dict[str, nn.Parameter]:
    """γ and β, or what a parametrization computes them from."""
    return {n: p for n, p in norm.named_parameters() if "." not in n or n.startswith("parametrizations.")}


def freeze(model: nn.Module) -> nn.Module:
    """Hold every batch normalization fixed, in place: running statistics in use and unchanging, γ and β without
    gradient, whatever `.train()` says later.

    The output is y = γ·(x − running_mean)/√(running_var + ε) + β, and the gradient dx = γ·dy/√(running_var + ε).
    Gradients that γ and β hold are set aside, so that an optimizer with momentum or weight decay does not
    move them either. Copies and pickles of a frozen model are frozen. Freezing twice is freezing once.

    Args:
        model: any module; torch's, our and other libraries' batch normalizations are frozen alike.

    Returns:
        The same model.

    Raises:
        UserError: a layer keeps no running statistics (`track_running_stats=False`), so it has nothing to be
            held at; the model is then unchanged.

    Warns:
        UserWarning: names the batch normalizations that are left alone: in TorchScript, or in a plain list or dict.
    """
    refuse_lazy(model, "freeze")
    norms = {name: m for name, m in model.named_modules() if is_norm(m) and not isinstance(m, _Frozen)}
    for name, norm in norms.items():
        if norm.running_mean is None or norm.running_var is None:
            raise UserError(
                f"freeze: {name or 'the model'} keeps no running statistics and uses the batch's in eval too; "
                "give it track_running_stats=True and recalibrate it first"
            )
    left = [f"{name or 'the model'} ({why})" for name, why in norms_out_of_reach(model).items()]
    for norm in norms.values():
        affine = _affine(norm)
        held = {name: (p.requires_grad, p.grad) for name, p in affine.items()}
        kind: Any = type(norm)
        norm.__class__ = frozen_class(kind)
        norm.__dict__.update(_before_freezing=held, _mode_asked=norm.training)
        norm.train(norm.training)
        if hasattr(norm, "frozen"):  # ours says so itself, in its repr and to the doctor
            norm.frozen = True
        for parameter in affine.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    if left:
        warnings.warn(f"freeze: left alone: {', '.join(left)}", stacklevel=2)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`, in place: every layer gets its class, its parameters' `requires_grad` and the gradients set
    aside back, and the mode that `.train()` or `.eval()` asked for last.

    Returns:
        The same model.
    """
    for norm in model.modules():
        if not isinstance(norm, _Frozen):
            if is_norm(norm):
                norm.__dict__.pop("frozen", None)
            continue
        held = norm.__dict__.pop("_before_freezing")
        mode = norm.__dict__.pop("_mode_asked")
        norm.__dict__.pop("frozen", None)
        norm.__class__ = thawed_class(type(norm))
        norm.train(mode)
        affine = _affine(norm)
        for name, (requires_grad, grad) in held.items():
            parameter = affine.get(name)
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
                if grad is not None and parameter.grad is None and grad.device == parameter.device:
                    parameter.grad = grad
    return model
