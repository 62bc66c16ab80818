"""Small ONNX files for the tests of the tools that read them, and `check`, which folds one and compares."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from batchnorm.model_tools import fold_onnx

RNG = np.random.default_rng(0)


def tensor(name: str, *shape: int, positive: bool = False, dtype=np.float32) -> onnx.TensorProto:
    values = RNG.standard_normal(shape)
    return numpy_helper.from_array((np.abs(values) + 0.5 if positive else values).astype(dtype), name)


def norm(name: str, source: str, *channels: int, dtype=np.float32, **attributes):
    """A BatchNormalization node and its four initializers."""
    names = [f"{name}.{part}" for part in ("scale", "shift", "mean", "var")]
    node = helper.make_node("BatchNormalization", [source, *names], [f"{name}.out"], name=name, **attributes)
    return node, [tensor(n, *channels, positive=n.endswith("var"), dtype=dtype) for n in names]


def model_of(nodes, initializers, shape, outputs, *, opset=17, ir=10, kind=TensorProto.FLOAT, rank=None, **more):
    """A model with the one input `x`; initializers are inputs too where the IR version wants it.

    `rank` is that of the outputs, where it is not the input's.
    """
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    if ir < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers]
    made = [helper.make_tensor_value_info(name, kind, [None] * (rank or len(shape))) for name in outputs]
    graph = helper.make_graph(nodes, "net", inputs, made, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir, **more)


def save(path, nodes, initializers, shape, outputs, **more):
    onnx.save(model_of(nodes, initializers, shape, outputs, **more), str(path))
    return path


def run(path, **inputs):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)


def widened(path):
    """The model with every float in float64, as a function of one array: what rounding should not have changed.

    onnx's evaluator lacks groups of a ConvTranspose and old forms of BatchNormalization; onnxruntime has them, and runs
    such a model as it is.
    """
    model = onnx.load(str(path))
    grouped = any(node.op_type == "ConvTranspose" and node.attribute for node in model.graph.node)
    if model.opset_import[0].version < 14 or grouped:
        return lambda x: run(path, x=x.astype(np.float32))
    constants = [a.t for node in model.graph.node for a in node.attribute if a.name == "value"]
    for held in (*model.graph.initializer, *constants):
        if held.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held).astype(np.float64), held.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del model.graph.value_info[:]
    evaluator = ReferenceEvaluator(model)
    return lambda x: evaluator.run(None, {"x": x.astype(np.float64)})


def check(path, tmp_path, shape, expected: dict[str, str | None], tolerance: float = 1e-5):
    """Fold the file, hold the answer against the old one's in float64, and the file against the standard."""
    target = tmp_path / "folded.onnx"
    report = fold_onnx(path, target)
    assert {entry.norm: entry.into for entry in report.entries} == expected, str(report)
    assert report.verified, str(report)
    onnx.checker.check_model(str(target), full_check=True)
    x = RNG.standard_normal(shape)
    for ours, theirs in zip(widened(target)(x), widened(path)(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())
    kept = [node.name for node in onnx.load(str(target)).graph.node if node.op_type == "BatchNormalization"]
    assert kept == [name for name, into in expected.items() if into is None]
    return report
