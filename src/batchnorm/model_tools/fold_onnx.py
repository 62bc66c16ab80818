"""Batch normalization folded inside an ONNX file: a file in, a file out, checked with onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError, quote_error
from ..inspect.folding import fold_target
from ..inspect.from_onnx import OnnxReader, attribute_of, nested_graphs, title_of
from ..inspect.operators import Effect
from .fold import Fold, FoldReport

__all__ = ["fold_onnx"]

_TOLERANCE = 1e-4
_LAYERS = ("Conv", "ConvTranspose", "Gemm")


def fold_onnx(source: str | Path, target: str | Path, example_inputs: Any = None) -> FoldReport:
    """Fold every `BatchNormalization` node of an ONNX file that can be into the Conv, ConvTranspose or Gemm before or
    after it.

    With s = scale/√(var + epsilon) and t = B − mean·s, a layer before becomes W[o]·s_o, b·s + t; a layer after becomes
    W[o, i]·s_i, b + Σ W[o, i]·t_i. What lies between the two has to be read by the second alone, and not be an output
    of the graph. A layer after must not pad with zeros, and a ConvTranspose after takes a scale only (t = 0): an ONNX
    node has no padding by channel. Weights are copied, so an initializer that other nodes use stays as it was. Both
    files then run in onnxruntime on the same inputs, and outputs have to agree within 1e-4 of the largest.

    Args:
        source: the file to read; weights in external files are read too.
        target: the file to write; it may be the source.
        example_inputs: a dict {input name: NumPy array}, or a tuple of arrays in the order of the graph's inputs; None
            draws normal ones, with 2 for every axis without a fixed size.

    Returns:
        `FoldReport`, by node or output names, also of the nodes in branches and functions, which stay. Needs onnx and
        onnxruntime.

    Raises:
        UserError: a file that is none, no ONNX model, inputs that do not fit, outputs that differ, or a target that
            cannot be written; nothing is then written.
    """
    onnx, runtime = _import("onnx"), _import("onnxruntime")
    model = _load(onnx, source)
    inputs = _inputs(onnx, model, example_inputs)
    reference = _run(runtime, model, inputs, source)
    report = _OnnxFolder(onnx, model).run()
    report.difference = _difference(_run(runtime, model, inputs, source), reference)
    if not report.difference <= _TOLERANCE:
        raise UserError(
            f"fold_onnx: the folded {source} differs by {report.difference:.1e} of the largest output; it stays as it "
            "is, please report this model"
        )
    _save(onnx, model, target)
    return report


def _load(onnx: Any, source: str | Path) -> Any:
    try:
        return onnx.load(str(source))
    except FileNotFoundError:
        raise UserError(f"fold_onnx: {source} does not exist; give the path of an ONNX file") from None
    except Exception as error:  # protobuf, and the file system have their own
        raise UserError(f"fold_onnx: {source} is no ONNX model: {quote_error(error)}; export it again") from error


def _save(onnx: Any, model: Any, target: str | Path) -> None:
    try:
        onnx.save(model, str(target))
    except Exception as error:  # the file system's, and protobuf's beyond 2 GB
        raise UserError(
            f"fold_onnx: {target} cannot be written: {quote_error(error)}; give the path of a file in a folder that "
            "exists"
        ) from error


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"fold_onnx needs {name}, which is not installed; pip install {name}") from None


def _inputs(onnx: Any, model: Any, given: Any) -> dict[str, Any]:
    import numpy as np

    initial = {tensor.name for tensor in model.graph.initializer}
    wanted = [value for value in model.graph.input if value.name not in initial]
    if isinstance(given, dict):
        return given
    if given is not None:
        arrays = given if isinstance(given, tuple) else (given,)
        if len(arrays) != len(wanted):
            raise UserError(f"fold_onnx: the graph takes {len(wanted)} inputs and {len(arrays)} were given; give all")
        return {value.name: np.asarray(array) for value, array in zip(wanted, arrays, strict=True)}
    generator = np.random.default_rng(0)
    drawn = {}
    for value in wanted:
        kind = value.type.tensor_type
        shape = [axis.dim_value or 2 for axis in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        drawn[value.name] = generator.standard_normal(shape).astype(dtype)
    return drawn


def _run(runtime: Any, model: Any, inputs: dict[str, Any], source: Any) -> list[Any]:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would fold by itself
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs: list[Any] = session.run(None, inputs)
    except Exception as error:
        raise UserError(
            f"fold_onnx: {source} does not run in onnxruntime: {quote_error(error)}; give example_inputs that fit"
        ) from error
    return outputs


def _difference(ours: list[Any], reference: list[Any]) -> float:
    import numpy as np

    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = np.abs(b).max(initial=0.0) or 1.0
        worst = max(worst, float(np.abs(a - b).max(initial=0.0) / scale))
    return worst


class _OnnxFolder:
    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx, self.model, self.graph = onnx, model, model.graph
        self.reader = OnnxReader(model)
        self.initial = self.reader.initial

    def run(self) -> FoldReport:
        entries: dict[str, Fold] = {}
        folded = True
        while folded:  # what one round takes out brings other pairs together
            folded = False
            for norm in [node for node in self.reader.read().nodes if node.effect is Effect.NORM]:
                entry = self._try(norm.name)
                entries[entry.norm] = entry
                folded |= entry.into is not None
        for where, nodes in nested_graphs(self.model):
            for node in nodes:
                if node.op_type == "BatchNormalization":
                    entries[title_of(node)] = Fold(title_of(node), None, f"inside {where}; inline it first")
        self._drop_unused()
        return FoldReport(list(entries.values()))

    def _try(self, name: str) -> Fold:
        graph = self.reader.read()
        call = next(node for node in graph.nodes if node.effect is Effect.NORM and node.name == name)
        if call.stays:
            return Fold(name, None, call.stays)
        norm = self.reader.nodes_of[call]
        s, t = self._scale_and_shift(norm)
        target = fold_target(call, graph, (), lambda node: self._why_not_after(self.reader.nodes_of[node], t))
        if target.layer is None:
            return Fold(name, None, target.reason)
        layer = self.reader.nodes_of[target.layer]
        if target.before:
            self._fold_before(layer, norm, s, t)
            return Fold(name, target.layer.name, "the layer before")
        self._fold_after(layer, norm, s, t)
        return Fold(name, target.layer.name, "the layer after")

    def _why_not_after(self, layer: Any, t: Any) -> str:
        if layer.op_type == "ConvTranspose" and t.any():
            return f"the ConvTranspose {title_of(layer)} gives every position another share of the shift"
        if layer.op_type == "Conv" and self._pads(layer) and t.any():
            return f"{title_of(layer)} pads with zeros, which would get the shift too"
        return ""

    def _pads(self, layer: Any) -> bool:
        automatic = attribute_of(layer, "auto_pad", b"NOTSET")
        return automatic in (b"SAME_UPPER", b"SAME_LOWER") or any(attribute_of(layer, "pads", []))

    # --- arithmetic, in float64 --------------------------------------------------------------------
    def _array(self, name: str) -> Any:
        return self.onnx.numpy_helper.to_array(self.initial[name]).astype("float64")

    def _scale_and_shift(self, norm: Any) -> tuple[Any, Any]:
        scale, shift, mean, var = (self._array(name) for name in norm.input[1:5])
        s = scale / (var + attribute_of(norm, "epsilon", 1e-5)) ** 0.5
        return s, shift - mean * s

    def _parts(self, layer: Any) -> tuple[Any, Any]:
        """The weight as (groups, out/groups, in/groups, *kernel) and the bias, with a Gemm's alpha and beta in them."""
        import numpy as np

        weight = self._array(layer.input[1])
        bias = self._array(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros(1)
        if layer.op_type == "Gemm":
            weight = weight if attribute_of(layer, "transB", 0) else weight.T
            scales = attribute_of(layer, "alpha", 1.0), attribute_of(layer, "beta", 1.0)
            return weight[None] * scales[0], bias * scales[1]
        groups = attribute_of(layer, "group", 1)
        weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return weight.swapaxes(1, 2) if layer.op_type == "ConvTranspose" else weight, bias

    def _fold_before(self, layer: Any, norm: Any, s: Any, t: Any) -> None:
        weight, bias = self._parts(layer)
        ones = [1] * (weight.ndim - 2)
        self._set(layer, weight * s.reshape(*weight.shape[:2], *ones), bias.reshape(-1) * s + t)
        layer.output[0] = norm.output[0]
        self.graph.node.remove(norm)

    def _fold_after(self, layer: Any, norm: Any, s: Any, t: Any) -> None:
        weight, bias = self._parts(layer)
        form = (weight.shape[0], 1, weight.shape[2], *[1] * (weight.ndim - 3))
        moved = (weight * t.reshape(form)).reshape(weight.shape[0] * weight.shape[1], -1).sum(1)
        self._set(layer, weight * s.reshape(form), bias + moved)
        layer.input[0] = norm.input[0]
        self.graph.node.remove(norm)

    def _set(self, layer: Any, weight: Any, bias: Any) -> None:
        dtype = self.onnx.numpy_helper.to_array(self.initial[layer.input[1]]).dtype
        if layer.op_type == "Gemm":
            weight = weight[0] if attribute_of(layer, "transB", 0) else weight[0].T
            for attribute in [a for a in layer.attribute if a.name in ("alpha", "beta")]:
                layer.attribute.remove(attribute)  # they are in the values now
        else:
            weight = weight.swapaxes(1, 2) if layer.op_type == "ConvTranspose" else weight
            weight = weight.reshape(-1, *weight.shape[2:])
        names = [self._new(layer, "weight", weight.astype(dtype)), self._new(layer, "bias", bias.astype(dtype))]
        del layer.input[1:]
        layer.input.extend(names)

    def _new(self, layer: Any, part: str, array: Any) -> str:
        name = f"{layer.output[0]}.folded_{part}"
        while name in self.initial:  # the layer was folded into before
            name += "_"
        tensor = self.onnx.numpy_helper.from_array(array, name)
        self.graph.initializer.append(tensor)
        self.initial[name] = tensor
        return name

    def _drop_unused(self) -> None:
        readers = self.reader.readers()
        inputs = {value.name for value in self.graph.input}
        for tensor in list(self.graph.initializer):
            if tensor.name not in self.reader.outputs and tensor.name not in inputs and not readers[tensor.name]:
                self.graph.initializer.remove(tensor)
