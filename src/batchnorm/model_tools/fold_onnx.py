"""Batch normalization folded inside an ONNX file: a file in, a file out, checked by running both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..errors import quote_error
from ..inspect.folding import per_channel_read
from ..inspect.from_onnx import OnnxReader, readers_of
from ..inspect.graph import GraphNode, ModelGraph
from ..inspect.operators import Effect
from .comparison import TOLERANCES, Comparison, compare
from .fold import Fold, FoldReport
from .onnx_files import Draft, load
from .onnx_rewrite import Leftovers, fold_after, fold_before, pass_by
from .onnx_runs import NotRun, Runs, import_or_say

__all__ = ["fold_onnx"]

_Key = tuple[int, str]  # the number of the graph, and the name of the normalization's result


def fold_onnx(source: str | Path, target: str | Path, example_inputs: Any = None) -> FoldReport:
    """Fold every `BatchNormalization` node of an ONNX file that can be into the layer before or after it.

    With s = scale/√(var + epsilon) and t = B − mean·s, a layer before becomes W[o]·s_o, b·s + t; a layer after becomes
    W[o, i]·s_i, b + Σ W[o, i]·t_i. A layer is a Conv, ConvTranspose, Gemm or MatMul with a constant weight, and the
    additions of a constant to each channel right after it. Between the two may stand what only moves elements (Flatten,
    Reshape, Transpose, Squeeze, Unsqueeze, Identity, Dropout); nothing else may read what lies there. A Conv after that
    pads with zeros, and a ConvTranspose after, take a scale only (t = 0): an ONNX node has no padding by channel.

    Branches, loops and local functions are graphs of their own and fold alike. A weight is constant when it is an
    initializer, a Constant node, or made of these by moving or converting elements. An initializer that is an input of
    the graph too is one up to IR version 3, where it had to be; later, it is the default value of an input that a
    caller may override, and what reads it stays. Weights are copied, so an initializer that other nodes use stays as
    it was; the arithmetic is in float64 and rounds once.

    Both files then run on the same inputs, in onnxruntime, or in onnx's reference evaluator where that is not installed
    or lacks an operator. A fold after which an output differs by more than the tolerance is taken back: 1e-10, 1e-4,
    1e-2, 5e-2 of the largest for float64, float32, float16, bfloat16, by the coarsest type of outputs and weights.

    Args:
        source: the file to read; weights in external files are read too, and the target then has such a file too.
        target: the file to write; it may be the source.
        example_inputs: a dict {input name: NumPy array}, or a tuple of arrays in the order of the graph's inputs; None
            draws normal ones, and tries several sizes for the axes without a fixed size.

    Returns:
        `FoldReport`, by node or output names. Its `not_verified` says why, if so, the files could not be compared.
        Needs onnx.

    Raises:
        UserError: a file that is none, no ONNX model, inputs that do not fit, or a target that cannot be written;
            nothing is then written.
    """
    onnx = import_or_say("onnx")
    model, external = load(onnx, source)
    runs, why_not = _runs(Path(source), model, example_inputs)
    shapes = {name: array.shape for name, array in runs.inputs.items()} if runs is not None else {}
    with Draft(onnx, target, external) as draft:
        folder = _OnnxFolder(_copy(model), shapes)
        folder.run()
        found = _checked(folder, draft, runs)
        if found.difference > folder.tolerance():
            folder, found = _one_at_a_time(model, shapes, draft, runs)
        draft.publish()
    return FoldReport(list(folder.entries.values()), *found, why_not)


def _runs(source: Path, model: Any, given: Any) -> tuple[Runs | None, str]:
    try:
        return Runs(source, model, given), ""
    except NotRun as error:
        return None, str(error)


def _copy(model: Any) -> Any:
    copied = type(model)()
    copied.CopyFrom(model)
    return copied


def _checked(folder: _OnnxFolder, draft: Draft, runs: Runs | None) -> Comparison:
    """Write what the folder made as the draft, and compare it."""
    path = draft.write(folder.finished())
    if runs is None:
        return Comparison(math.nan, 0, 0)
    try:
        return compare(runs.outputs(path), runs.reference)
    except Exception as error:  # it ran before the fold, so this is ours, whatever the evaluator calls it
        folder.failure = f"the folded model does not run: {quote_error(error)}"
        return Comparison(math.inf, 0, 0)


def _one_at_a_time(
    model: Any, shapes: dict[str, Any], draft: Draft, runs: Runs | None
) -> tuple[_OnnxFolder, Comparison]:
    """Fold one normalization after the other, each verified; one that breaks the tolerance is taken back."""
    before, refused = model, dict[_Key, str]()
    folder = _OnnxFolder(_copy(before), shapes, refused)
    while (key := folder.one_round(all_at_once=False)) is not None:
        now = _checked(folder, draft, runs).difference
        if not now > folder.tolerance():
            before = _copy(folder.model)
            continue
        refused[key] = folder.failure or f"folding it changed an output by {now:.1e}, more than the tolerance"
        entries = folder.entries
        folder = _OnnxFolder(_copy(before), shapes, refused)
        folder.entries = entries
    return folder, _checked(folder, draft, runs)


class _OnnxFolder:
    def __init__(self, model: Any, shapes: dict[str, Any], refused: dict[_Key, str] | None = None) -> None:
        self.model, self.refused = model, refused or {}
        self.leftovers = Leftovers(model)
        self.readers = readers_of(model, shapes)
        self.entries: dict[_Key, Fold] = {}
        self.types: set[str] = set()
        self.failure = ""  # why the folded model does not run

    def run(self) -> None:
        while self.one_round(all_at_once=True) is not None:  # what one takes out brings other pairs together
            pass

    def one_round(self, all_at_once: bool) -> _Key | None:
        """Fold all pairs there are now, or the first; return the last one folded, or None.

        A fold asks the nodes themselves for names and weights, so one reading serves a round.
        """
        folded = None
        for number, reader in enumerate(self.readers):
            graph = reader.read()
            for call in graph.of_effect(Effect.NORM):
                key = (number, reader.nodes_of[call].output[0])
                self.entries[key] = self._try(reader, graph, call, self.refused.get(key, ""))
                if self.entries[key].into is not None:
                    folded = key
                    if not all_at_once:
                        return folded
        return folded

    def finished(self) -> Any:
        self.leftovers.remove()
        return self.model

    def tolerance(self) -> float:
        outputs = [value.type.tensor_type.elem_type for value in self.model.graph.output]
        types = self.types | {_type_name(number) for number in outputs}
        return max((TOLERANCES.get(getattr(torch, name, torch.bool), 0.0) for name in types), default=0.0)

    def _try(self, reader: OnnxReader, graph: ModelGraph, call: GraphNode, reason: str) -> Fold:
        if reason or call.stays:
            return Fold(call.name, None, reason or call.stays)
        norm = reader.nodes_of[call]
        s, t = reader.scale_and_shift(norm)
        target = reader.fold_target(call, graph)
        if not target.layers:
            return Fold(call.name, None, target.reason)
        for node in target.layers:
            layer = reader.layer_of[node]
            self.types.add(_type_name(layer.weight.data_type))
            if target.before:
                order = sorted(range(len(s)), key=call.spread.__getitem__) if call.spread else slice(None)
                fold_before(layer, norm, s[order], t[order])
            else:
                fold_after(layer, *per_channel_read(node, s, t))
        if not target.before:
            pass_by(norm, reader.scope)
        return Fold(call.name, target.name, "the layer before" if target.before else "the layer after")


def _type_name(data_type: int) -> str:
    """torch's name of a floating type; ONNX's in small letters of any other."""
    from onnx import TensorProto

    name: str = TensorProto.DataType.Name(data_type).lower()
    return {"double": "float64", "float": "float32"}.get(name, name)
