"""Whether what a run showed stands for every input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .from_export import why_no_program
from .graph import ModelGraph

__all__ = ["decided"]


def decided(graph: ModelGraph, model: nn.Module, example: Any) -> ModelGraph:
    """The graph of the model's run on the example, with `undecided` set where other values may take another way.

    They cannot where Python came to know none of them, nor where `torch.export` takes the model: no value decides which
    operators its program runs. Shapes, and arguments that are no tensors, are those of the example in either case. Not
    seen is a forward that asks whether it is being exported, or decides by the text that it makes of a value.
    """
    if graph.draws_in_python:
        return replace(graph, undecided="control flow may be random: the forward draws random numbers in Python")
    why_not = why_no_program(model, example) if graph.value_reads else ""
    if not why_not:
        return graph
    reason = f"control flow depends on the data, as far as can be told ({graph.value_reads[0]}; {why_not})"
    return replace(graph, undecided=reason)
