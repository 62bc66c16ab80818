"""Views of a model's γ and β: optimizer groups, the ranking that pruning goes by, and copies for averaged models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import UserError
from ..inspect.modules import is_norm

__all__ = ["Importance", "copy_statistics", "importance", "param_groups"]

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what decays, and what does not: γ and β of every normalization, and every bias.

    Decay on γ and β does not regularize the function where a normalization follows; it only changes the step
    size. The evidence on accuracy is mixed. Normalizations are torch's, ours, and modules of other libraries that are
    called so ("…Norm…"). A shared parameter stands in one group, once; parameters without gradient stand in theirs,
    so that `unfreeze` finds them there.

    Args:
        model: any module.
        weight_decay: of the first group; the second one's is 0.

    Returns:
        `[{"params": […], "weight_decay": weight_decay}, {"params": […], "weight_decay": 0.0}]`

    Raises:
        UserError: a negative or non-finite weight decay.
    """
    if not 0 <= weight_decay < float("inf"):
        raise UserError(f"param_groups: weight_decay is {weight_decay}; give a finite number, 0 or more")
    still: set[Tensor] = set()
    for module in model.modules():
        norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if "bias" in name or (norm and (nn.parameter.is_lazy(parameter) or parameter.dim() <= 1)):
                still.add(parameter)
    return [
        {"params": [p for p in model.parameters() if p not in still], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p in still], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Importance:
    """|γ| of every channel, by layer (`scores`), and what follows from it."""

    scores: dict[str, Tensor]

    def ranking(self) -> list[tuple[str, int, float]]:
        """(layer, channel, |γ|) of all channels of all layers, the least important first."""
        rows = [(name, i, value) for name, s in self.scores.items() for i, value in enumerate(s.tolist())]
        return sorted(rows, key=lambda row: row[2])

    def least(self, share: float) -> dict[str, list[int]]:
        """The channels among the `share` of all channels with the smallest |γ|, by layer, as Torch-Pruning takes them
        (`pruning_idxs`). At least one channel of every layer is kept.

        Raises:
            UserError: a share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise UserError(f"least: share is {share}; give a number between 0 and 1")
        chosen: dict[str, list[int]] = {name: [] for name in self.scores}
        rows = self.ranking()
        for name, channel, _ in rows[: round(share * len(rows))]:
            if len(chosen[name]) + 1 < self.scores[name].numel():
                chosen[name].append(channel)
        return {name: sorted(channels) for name, channels in chosen.items()}


def importance(model: nn.Module) -> Importance:
    """|γ| of every channel of every batch normalization: the network-slimming criterion.

    A channel's output is γ·x̂ + β with x̂ of variance 1, so |γ| is its standard deviation before the
    activation. It says how much a channel varies, not how much the loss needs it, and it compares layers only
    where γ was trained with a penalty on it. Layers without γ are left out.

    Args:
        model: any module.

    Returns:
        `Importance`, of copies on the CPU.

    Source: Liu et al. 2017, https://arxiv.org/abs/1708.06519.
    """
    named = [(name, m) for name, m in model.named_modules() if is_norm(m)]
    gammas: dict[str, Any] = {name: getattr(m, "weight", None) for name, m in named}
    return Importance({name: g.detach().abs().float().cpu() for name, g in gammas.items() if g is not None})


def copy_statistics(source: nn.Module, target: nn.Module) -> list[str]:
    """Copy the running statistics of every batch normalization of `source` into the layer of the same name of
    `target`, in place: for a moving average of the parameters, whose buffers were never averaged.

    The statistics are those of the source's weights; for an average that lies far from them (SWA over
    epochs) `recalibrate(target, batches)` is right and this is an approximation. An
    `torch.optim.swa_utils.AveragedModel` and a `DistributedDataParallel` stand for the model inside.

    Returns:
        The names of the layers copied into.

    Raises:
        UserError: the two do not hold the same layers; `target` is then unchanged.
    """
    theirs, mine = _statistics(source), _statistics(target)
    for name in sorted(theirs.keys() ^ mine.keys()):
        raise UserError(f"copy_statistics: only one of the two models holds {name}; pass a model and its average")
    for name, buffer in mine.items():
        if buffer.shape != theirs[name].shape:
            raise UserError(
                f"copy_statistics: {name} has shape {tuple(theirs[name].shape)} in the source and "
                f"{tuple(buffer.shape)} in the target; pass a model and its average"
            )
    with torch.no_grad():
        for name, buffer in mine.items():
            given = theirs[name]  # a counter may be of any dtype
            buffer.copy_(given.real if given.is_complex() else given)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in mine))


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    wrappers = (torch.optim.swa_utils.AveragedModel, nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers):
        model = model.module
    return {
        f"{name}.{key}" if name else key: buffer
        for name, module in model.named_modules()
        if is_norm(module)
        for key, buffer in module.named_buffers(recurse=False)
    }
