"""Other libraries' subclasses of torch's BatchNorm that also activate (timm's `BatchNormAct2d`), computed by ours.

Their class stays in the class: every `isinstance`, their own parts `act` and `drop`, and their keys are what they were.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..layer_call import run_layer
from ..layers import BatchNormBase
from ..pairs import known_activation
from .derived import Derived
from .freeze import thawed_class

__all__ = ["ForeignNormAct", "is_norm_act"]

_PARTS = {"act", "drop"}


class ForeignNormAct(Derived, BatchNormBase):
    """``act(drop(batch_norm(input)))``, in one operator while nobody looks between the parts."""

    usual_dims = (4,)

    def forward(self, input: Tensor, mask: Tensor | None = None, domain: int | Tensor | None = None) -> Tensor:
        act, drop = self._modules.get("act"), self._modules.get("drop")
        together = drop is None or (type(drop) is nn.Identity and known_activation(drop))
        word = known_activation(act) if together else None
        if word is not None:
            return run_layer(self, input, None, mask, domain, *word)
        out = run_layer(self, input, None, mask, domain)
        for part in (drop, act):
            out = out if part is None else part(out)
        return out


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def is_norm_act(module: nn.Module) -> bool:
    """Whether the module is a `BatchNorm2d` or `SyncBatchNorm` of torch followed by its parts `drop` and `act` alone.

    A copy with known parts is tried in both modes: names alone would promise too much.
    """
    if not isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) or "act" not in module._modules:
        return False
    if not module._modules.keys() <= _PARTS or isinstance(module, BatchNormBase):
        return False
    try:
        modes = (False,) if isinstance(module, nn.SyncBatchNorm) else (True, False)
        return all(_agrees(module, mode) for mode in modes)
    except Exception:  # a forward that takes no image: another kind of module
        return False


def _agrees(module: Any, training: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    trial: Any = copy.deepcopy(module)
    trial.__class__ = thawed_class(type(trial))
    trial.to_empty(device="cpu").double().train(training)
    plain = nn.BatchNorm2d(
        trial.num_features, trial.eps, trial.momentum, trial.affine, trial.track_running_stats, dtype=torch.float64
    ).train(training)
    with torch.no_grad():
        for name, tensor in plain.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
            trial.state_dict()[name].copy_(tensor)
        x = torch.randn(3, trial.num_features, 2, 2, generator=generator, dtype=torch.float64)
        trial.act, doubled = nn.Tanh(), "drop" in trial._modules
        if doubled:
            trial.drop = _Double()
        found, normalized = trial(x), plain(x)
    same_state = all(torch.allclose(a, b) for a, b in zip(trial.buffers(), plain.buffers(), strict=True))
    return same_state and torch.allclose(found, (2 * normalized if doubled else normalized).tanh())
