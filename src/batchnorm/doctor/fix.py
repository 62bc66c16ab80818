"""Mends what can be mended safely in a model as it stands, and tells what it changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UserError
from ..model_tools.freeze import freeze
from ..model_tools.recalibrate import recalibrate
from .diagnosis import Diagnosis, Finding, shown
from .examine import diagnose
from .facts.batches import MOST_BATCHES, as_batch

__all__ = ["Change", "Mending", "mend"]


@dataclass(frozen=True)
class Change:
    """One value that was changed."""

    code: str
    module: str
    what: str
    before: str
    after: str


@dataclass
class Mending:
    """`changes` are the difference, `left` says for each other finding's code why it stays; `before` and `after` count
    the findings by code, which is the effect."""

    changes: list[Change] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    diagnosis: Diagnosis | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the mending for JSON."""
        return {
            "changes": [vars(change) for change in self.changes],
            "left": self.left,
            "before": dict(self.before),
            "after": dict(self.after),
        }


def mend(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Mending:
    """Examines the model, mends in place what is safe, and examines it again.

    Safe is what leaves the function that training computes as it is, or makes evaluation compute the same: a
    redundant bias (BN101: into the running mean, then held at 0, so that the state file keeps its keys),
    momentum (BN102), half-frozen layers (BN103: frozen), decay of γ and β (BN104: regrouped in the optimizer, its
    state kept), and running statistics that are untrained, broken or away (BN106, BN107, BN202: recalibrated).

    Args:
        model, batches, optimizer, options: as `diagnose` takes them.

    Returns:
        A `Mending`.

    Raises:
        UserError: as `diagnose`.
    """
    # Three readers follow: an iterator is read once and kept.
    given = list(islice(batches, MOST_BATCHES)) if isinstance(batches, Iterator) else batches
    before = diagnose(model, given, optimizer=optimizer, **options)
    mending = Mending(before=Counter(finding.code for finding in before.findings))
    recalibration = {f.code for f in before.findings} & {"BN106", "BN107", "BN202"}
    for finding in before.findings:
        mender = _MENDERS.get(finding.code)
        if mender is not None:
            mending.changes += mender(model, finding, optimizer)
        elif finding.code not in recalibration:
            mending.left[finding.code] = f"in the code, not in the values: {finding.fix}"
    if recalibration:
        mending.changes += _recalibrate(model, given, recalibration, mending.left)
    mending.diagnosis = diagnose(model, given, optimizer=optimizer, **options)
    mending.after = Counter(finding.code for finding in mending.diagnosis.findings)
    return mending


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a functional call has no module
        return None


@torch.no_grad()
def _mend_bias(model: nn.Module, finding: Finding, optimizer: Optimizer | None) -> list[Change]:
    layer, norm = _module(model, finding.module), _module(model, str(finding.evidence["normalized_by"]))
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, nn.Parameter) or norm is None:
        return []
    largest = float(bias.abs().max())
    mean = getattr(norm, "running_mean", None)
    if isinstance(mean, Tensor) and mean.shape == bias.shape:
        mean.sub_(bias.to(mean.dtype))
    bias.zero_()
    bias.requires_grad_(False)
    return [Change("BN101", finding.module, "bias, into the running mean", f"up to {largest:.3g}", "0, held")]


def _mend_momentum(model: nn.Module, finding: Finding, optimizer: Optimizer | None) -> list[Change]:
    norm, momentum = _module(model, finding.module), float(finding.evidence["momentum"])
    if norm is None:
        return []
    norm.momentum = round(1 - momentum, 6) if 0.5 <= momentum < 1 else 0.1
    return [Change("BN102", finding.module, "momentum", shown(momentum), shown(norm.momentum))]


def _mend_half_frozen(model: nn.Module, finding: Finding, optimizer: Optimizer | None) -> list[Change]:
    norm = _module(model, finding.module)
    if norm is None:
        return []
    freeze(norm)
    return [Change("BN103", finding.module, "running statistics", "moving", "held")]


def _mend_decay(model: nn.Module, finding: Finding, optimizer: Optimizer | None) -> list[Change]:
    norm = _module(model, finding.module)
    if norm is None or optimizer is None:
        return []
    own = {id(p) for p in (norm.weight, norm.bias) if p is not None}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own and group.get("weight_decay")]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in own]
            still = {**{k: v for k, v in group.items() if k != "params"}, "weight_decay": 0.0, "batch_norm": True}
            _still_group(optimizer, still)["params"] += moved
    return [Change("BN104", finding.module, "weight decay of γ and β", shown(finding.evidence["weight_decay"]), "0")]


def _still_group(optimizer: Optimizer, settings: dict[str, Any]) -> dict[str, Any]:
    """The group without decay and of the same other settings, made where it is missing."""
    for group in optimizer.param_groups:
        if {k: v for k, v in group.items() if k != "params"} == settings:
            return group
    group = {**settings, "params": []}
    optimizer.param_groups.append(group)
    return group


_MENDERS: dict[str, Callable[[nn.Module, Finding, Optimizer | None], list[Change]]] = {
    "BN101": _mend_bias,
    "BN102": _mend_momentum,
    "BN103": _mend_half_frozen,
    "BN104": _mend_decay,
}


def _recalibrate(model: nn.Module, batches: Any, codes: set[str], left: dict[str, str]) -> list[Change]:
    if batches is None:
        left.update(dict.fromkeys(codes, "recalibration needs batches"))
        return []
    try:
        done = recalibrate(
            model, batches, forward=lambda module, raw: as_batch(raw, module).call(module), process_group=None
        )
    except UserError as error:
        left.update(dict.fromkeys(codes, str(error)))
        return []
    return [
        Change(min(codes), name, "running statistics", f"mean off by {s.mean_rms:.3g} σ", f"of {done.samples} samples")
        for name, s in done.layers.items()
    ]
