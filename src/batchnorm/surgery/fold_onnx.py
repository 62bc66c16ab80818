"""Batch normalization folded inside an ONNX file: a file in, a file out, checked with onnxruntime."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..errors import UserError, quote_error
from .fold import Fold, FoldReport

__all__ = ["fold_onnx"]

_TOLERANCE = 1e-4


def fold_onnx(source: str | Path, target: str | Path, example_inputs: Any = None) -> FoldReport:
    """Folds every `BatchNormalization` node of an ONNX file into the Conv, ConvTranspose or Gemm before it.

    With s = scale/√(var + epsilon): W' = W·s along the output channels, b' = (b − mean)·s + B. The node before has to
    be read by the normalization alone, and not be an output of the graph. Weights are copied, so an initializer
    that other nodes use stays as it was. Both files then run in onnxruntime on the same inputs, and outputs
    have to agree within 1e-4 of the largest.

    Args:
        source: the file to read; weights in external files are read too.
        target: the file to write; it may be the source.
        example_inputs: a dict {input name: NumPy array}, or a tuple of arrays in the order of the graph's inputs; None
            draws normal ones, with 2 for every axis without a fixed size.

    Returns:
        `FoldReport`, by node or output names. Needs onnx and onnxruntime.

    Raises:
        UserError: a file that is none, no ONNX model, inputs that do not fit, or outputs that differ; nothing is
            then written.
    """
    onnx, runtime = _import("onnx"), _import("onnxruntime")
    try:
        model = onnx.load(str(source))
    except FileNotFoundError:
        raise UserError(f"fold_onnx: {source} does not exist; give the path of an ONNX file") from None
    except Exception as error:  # protobuf, and the file system have their own
        raise UserError(f"fold_onnx: {source} is no ONNX model: {quote_error(error)}; export it again") from error
    inputs = _inputs(onnx, model, example_inputs)
    reference = _run(runtime, model, inputs, source)
    report = _OnnxFolder(onnx, model).run()
    report.difference = _difference(_run(runtime, model, inputs, source), reference)
    if not report.difference <= _TOLERANCE:
        raise UserError(
            f"fold_onnx: the folded {source} differs by {report.difference:.1e} of the largest output; it stays as it "
            "is, please report this model"
        )
    onnx.save(model, str(target))
    return report


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
        self.onnx, self.graph = onnx, model.graph
        self.initial = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}
        self.entries: list[Fold] = []

    def run(self) -> FoldReport:
        for norm in [node for node in self.graph.node if node.op_type == "BatchNormalization"]:
            name = norm.name or norm.output[0]
            self._index()
            layer, reason = self._layer_before(norm)
            if layer is None:
                self.entries.append(Fold(name, None, reason))
                continue
            self._fold(layer, norm)
            self.entries.append(Fold(name, layer.name or layer.output[0], "the layer before"))
        self._drop_unused()
        return FoldReport(self.entries)

    def _index(self) -> None:
        self.producer = {output: node for node in self.graph.node for output in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
            for attribute in node.attribute:  # a branch reads names of the graph around it
                for inner in attribute.g.node:
                    for name in inner.input:
                        self.readers[name].append(node)

    def _attribute(self, node: Any, name: str, default: Any) -> Any:
        found = next((a for a in node.attribute if a.name == name), None)
        return default if found is None else self.onnx.helper.get_attribute_value(found)

    def _layer_before(self, norm: Any) -> tuple[Any, str]:
        if self._attribute(norm, "training_mode", 0) or len([o for o in norm.output if o]) > 1:
            return None, "in training mode; export the model in eval"
        if any(name not in self.initial for name in norm.input[1:]):
            return None, "its parameters are computed"
        layer = self.producer.get(norm.input[0])
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            return None, "it does not read a layer's result"
        if norm.input[0] in self.outputs or len(self.readers[norm.input[0]]) > 1:
            return None, f"the result of {layer.name or layer.output[0]} is also read elsewhere"
        if any(name and name not in self.initial for name in layer.input[1:]):
            return None, f"{layer.name or layer.output[0]} computes its weight"
        biases = [list(self.initial[name].dims) for name in layer.input[2:] if name]
        if any(size != 1 for dims in biases for size in dims[:-1]):
            return None, f"the bias of {layer.name or layer.output[0]} differs along the batch"
        return layer, ""

    def _array(self, name: str) -> Any:
        return self.onnx.numpy_helper.to_array(self.initial[name]).astype("float64")

    def _fold(self, layer: Any, norm: Any) -> None:
        import numpy as np

        scale, shift, mean, var = (self._array(name) for name in norm.input[1:5])
        s = scale / np.sqrt(var + self._attribute(norm, "epsilon", 1e-5))
        weight = self._array(layer.input[1])
        bias = self._array(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else np.zeros_like(mean)
        kind = self.onnx.numpy_helper.to_array(self.initial[layer.input[1]]).dtype
        if layer.op_type == "Gemm":
            weight = weight * (s[:, None] if self._attribute(layer, "transB", 0) else s[None, :])
            bias = np.broadcast_to(bias.reshape(-1) * self._attribute(layer, "beta", 1.0), mean.shape)
            for attribute in [a for a in layer.attribute if a.name == "beta"]:
                layer.attribute.remove(attribute)  # it is in the bias now
        elif layer.op_type == "ConvTranspose":
            groups = self._attribute(layer, "group", 1)
            grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
            scales = s.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
            weight = (grouped * scales).reshape(weight.shape)
        else:
            weight = weight * s.reshape(-1, *[1] * (weight.ndim - 1))
        names = [self._new(layer, "weight", weight, kind), self._new(layer, "bias", (bias - mean) * s + shift, kind)]
        del layer.input[1:]
        layer.input.extend(names)
        layer.output[0] = norm.output[0]
        self.graph.node.remove(norm)

    def _new(self, layer: Any, part: str, array: Any, kind: Any) -> str:
        name = f"{layer.output[0]}.folded_{part}"
        tensor = self.onnx.numpy_helper.from_array(array.astype(kind), name)
        self.graph.initializer.append(tensor)
        self.initial[name] = tensor
        return name

    def _drop_unused(self) -> None:
        self._index()
        inputs = {value.name for value in self.graph.input}
        for name, tensor in self.initial.items():
            if name not in self.outputs and name not in inputs and not self.readers[name]:
                self.graph.initializer.remove(tensor)
