from __future__ import annotations

from collections.abc import Iterator

from ..evidence.needs import Evidence
from ..rule import Found, rule


@rule(
    "BN110",
    "shared-module",
    summary="One batch normalization is called several times a forward, and its statistics mix what it sees there.",
    order=120,
    needs=("batch",),
    fix="give each call a batch normalization of its own; the layers around it may stay shared",
    false_alarm="all its calls see the same distribution (views of the same images, say)",
)
def shared_module(evidence: Evidence) -> Iterator[Found]:
    for layer, seen in evidence.observed():
        if seen.calls > 1 and not layer.frozen and layer.running_mean is not None:
            yield Found(layer.name, f"is called {seen.calls} times a forward", {"calls": seen.calls})
