from __future__ import annotations

from collections.abc import Iterator

from ..change import Change, RepairContext
from ..diagnosis import Finding, shown
from ..evidence.needs import Evidence
from ..rule import Found, rule


def set_momentum(context: RepairContext, finding: Finding) -> list[Change]:
    """Set 1 − momentum where the Keras convention explains the value, else PyTorch's default."""
    norm, momentum = context.module(finding.module), float(finding.evidence["momentum"])
    if norm is None:
        return []
    norm.momentum = round(1 - momentum, 6) if 0.5 <= momentum < 1 else 0.1
    statement = f"{{}}.momentum = {norm.momentum!r}"
    return [
        Change(finding.code, finding.module, "momentum", shown(momentum), shown(norm.momentum), statement, safe=False)
    ]


@rule(
    "BN102",
    "momentum-convention",
    summary="momentum is 0, or 0.5 and more: in PyTorch it is the weight of the NEW batch.",
    order=150,
    needs=("model",),
    fix="set momentum to 1 minus the Keras value: 0.1 for 0.9, 0.01 for 0.99",
    false_alarm="the statistics are meant to be those of the last batch or two, or are held still on purpose",
    repair=set_momentum,
    unsafe=True,
)
def momentum_convention(evidence: Evidence) -> Iterator[Found]:
    for layer in evidence.layers:
        momentum = layer.momentum
        if momentum is None or layer.running_mean is None or layer.frozen:
            continue
        if layer.kind == "functional" and not layer.training:
            continue  # an evaluation does not use its momentum
        if momentum >= 0.5 or momentum < 0 or momentum != momentum:
            keeps = max(0.0, 1 - momentum)
            message = f"each batch replaces {momentum:.0%} of the running statistics"
            fix = f"set momentum={keeps:.3g}" if 0 < keeps <= 0.5 else "set momentum=0.1"
        elif momentum == 0 and not layer.affine_is_held:
            message, fix = "the running statistics never move", "set momentum=0.1"
        else:
            continue
        yield Found(layer.name, message, {"momentum": float(momentum)}, fix=fix)
