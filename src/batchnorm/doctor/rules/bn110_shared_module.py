from __future__ import annotations

from collections.abc import Iterator

from ..facts.facts import Facts
from ..rule import Found, rule


@rule(
    "BN110",
    "shared-module",
    summary="One batch normalization is called several times a forward, and its statistics mix what it sees there.",
    needs=("batch",),
    fix="give each call a batch normalization of its own; the layers around it may stay shared",
    false_alarm="all its calls see the same distribution (views of the same images, say)",
)
def shared_module(facts: Facts) -> Iterator[Found]:
    for layer, seen in facts.observed():
        if seen.calls > 1 and layer.live and layer.running_mean is not None:
            yield Found(layer.name, f"is called {seen.calls} times a forward", {"calls": seen.calls})
