"""What an exported program or an ONNX file holds of batch normalization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import UserError, quote_error

__all__ = ["FileFacts", "Normalization", "is_file", "read_file"]

_LAYERS = ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d", "linear", "addmm")
_ALWAYS_TRAINING = (
    "_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_with_update_functional",
)  # fmt: skip
# Position of the `training` argument.
_BY_ARGUMENT = {"batch_norm": 5, "native_batch_norm": 5, "_native_batch_norm_legit": 5, "cudnn_batch_norm": 5}
_ONNX_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_NEVER_TRAINING = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")


@dataclass(frozen=True)
class Normalization:
    """One batch normalization in a file. `foldable_into`: the layer right before it that nobody else reads."""

    name: str
    training: bool
    operator: str
    foldable_into: str | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


@dataclass
class FileFacts:
    """`origin` is "ONNX file" or "exported program"."""

    origin: str
    normalizations: list[Normalization] = field(default_factory=list)


def is_file(model: Any) -> bool:
    """Whether `model` is a path or an exported program and no module."""
    return isinstance(model, (str, Path, ExportedProgram))


def read_file(source: str | Path | ExportedProgram) -> FileFacts:
    """Reads an exported program, a .pt2 or an .onnx file.

    Raises:
        UserError: no such file, a name of another kind, content that cannot be read, or onnx is not installed.
    """
    if isinstance(source, ExportedProgram):
        return _from_program(source)
    path = Path(source)
    if path.suffix.lower() not in (".onnx", ".pt2"):
        raise UserError(f"neither an .onnx nor a .pt2 file, {path}, pass one of these or pkg.mod:function")
    if not path.is_file():
        raise UserError(f"no such file, {path}, correct the path")
    return _from_onnx(path) if path.suffix.lower() == ".onnx" else _from_program(_load_program(path))


def _load_program(path: Path) -> ExportedProgram:
    try:
        return torch.export.load(path)
    except Exception as error:
        raise UserError(
            f"not a program that torch.export.save wrote ({quote_error(error)}), {path}, export the model again"
        ) from error


# --- torch.export ------------------------------------------------------------------------------------------
def _from_program(program: ExportedProgram) -> FileFacts:
    facts = FileFacts("exported program")
    for node in program.graph.nodes:
        operator = _operator(node)
        training = _training(node, operator)
        if training is None or _is_instance_norm(node):
            continue
        source = node.args[0]
        name = _module_path(node)
        mean, var = (_tensor_of(program, argument) for argument in _statistics(node, operator))
        folds = _operator(source) in _LAYERS and len(source.users) == 1 and not training
        into = _module_path(source) if folds else None
        facts.normalizations.append(Normalization(name, training, operator, into, mean, var))
    return facts


def _operator(node: Any) -> str:
    if getattr(node, "op", "") != "call_function":
        return ""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", "")))


def _training(node: Any, operator: str) -> bool | None:
    if operator in _ALWAYS_TRAINING:
        return True
    if operator in _NEVER_TRAINING:
        return False
    if operator not in _BY_ARGUMENT:
        return None
    if getattr(node.target, "_overloadname", "") == "no_stats":
        return True
    named = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    return bool(named.get("training", False))


def _is_instance_norm(node: Any) -> bool:
    """torch writes an instance normalization as the batch normalization of one sample of N·C channels."""
    source = node.args[0]
    before = source.args[0] if _operator(source) in ("view", "reshape", "_unsafe_view") else None
    shape, earlier = (getattr(getattr(n, "meta", {}).get("val"), "shape", None) for n in (source, before))
    if shape is None or earlier is None or len(earlier) < 3:
        return False
    return bool(shape[0] == 1 and shape[1] == earlier[0] * earlier[1] and len(shape) == len(earlier))


def _statistics(node: Any, operator: str) -> tuple[Any, Any]:
    named = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}
    return named.get("running_mean"), named.get("running_var")


def _tensor_of(program: ExportedProgram, argument: Any) -> Tensor | None:
    name = getattr(argument, "name", None)
    target = program.graph_signature.inputs_to_buffers.get(name) if name else None
    found = program.state_dict.get(target) if target else None
    if found is None and target:
        found = program.constants.get(target)
    return found if isinstance(found, Tensor) else None


def _module_path(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].") or str(node.name)


# --- ONNX ------------------------------------------------------------------------------------------------
def _from_onnx(path: Path) -> FileFacts:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise UserError(
            f"onnx is not installed, needed to read {path}, install it with pip install 'batchnorm[onnx]'"
        ) from error
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise UserError(f"not an ONNX file ({quote_error(error)}), {path}, export the model again") from error
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    facts = FileFacts("ONNX file")
    for graph in (model.graph, *model.functions):
        facts.normalizations += _in_graph(graph, opset)
    return facts


def _in_graph(graph: Any, opset: int) -> Iterator[Normalization]:
    from onnx import numpy_helper

    made = {output: node for node in graph.node for output in node.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for output in graph.output:  # a function's outputs are plain names
        name = getattr(output, "name", output)
        readers[name] = readers.get(name, 0) + 1
    weights = {w.name: w for w in getattr(graph, "initializer", [])}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _in_graph(attribute.g, opset)
        if node.op_type != "BatchNormalization":
            continue
        source = made.get(node.input[0])
        training = _onnx_training(node, opset)
        mean, var = (
            torch.from_numpy(numpy_helper.to_array(weights[n]).copy()) if n in weights else None
            for n in (*node.input[3:5], "", "")[:2]
        )
        into = None
        if source is not None and source.op_type in _ONNX_LAYERS and not training and readers[node.input[0]] == 1:
            into = source.name or source.op_type
        yield Normalization(node.name or node.output[0], training, node.op_type, into, mean, var)


def _onnx_training(node: Any, opset: int) -> bool:
    attributes = {a.name: a.i for a in node.attribute}
    if opset >= 14:
        return bool(attributes.get("training_mode", 0))
    if opset >= 7:  # before the attribute, more outputs than one said it
        return len([name for name in node.output if name]) > 1
    return not attributes.get("is_test", 0)
