from __future__ import annotations

from collections.abc import Iterator

from ..facts.facts import Facts
from ..rule import Found, rule


@rule(
    "BN102",
    "momentum-convention",
    summary="momentum is 0, or 0.5 and more: in PyTorch it is the weight of the NEW batch.",
    needs=("model",),
    fix="set momentum to 1 minus the Keras value: 0.1 for 0.9, 0.01 for 0.99",
    false_alarm="the statistics are meant to be those of the last batch or two, or are held still on purpose",
)
def momentum_convention(facts: Facts) -> Iterator[Found]:
    for layer in facts.layers:
        momentum = layer.momentum
        if momentum is None or layer.running_mean is None or layer.frozen or layer.kind in ("frozen", "custom"):
            continue
        if layer.kind == "functional" and not layer.training:
            continue  # what an evaluation passes along is not used
        held = bool(layer.affine) and not layer.affine_learns
        if momentum >= 0.5 or momentum < 0 or momentum != momentum:
            keeps = max(0.0, 1 - momentum)
            message = f"each batch replaces {momentum:.0%} of the running statistics"
            fix = f"set momentum={keeps:.3g}" if 0 < keeps <= 0.5 else "set momentum=0.1"
        elif momentum == 0 and not held:
            message, fix = "the running statistics never move", "set momentum=0.1"
        else:
            continue
        yield Found(layer.name, message, {"momentum": float(momentum)}, fix=fix)
