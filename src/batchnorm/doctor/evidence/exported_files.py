"""What an exported program, an ONNX file or a checkpoint holds of batch normalization."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ...errors import UserError, quote_error
from ...inspect.folding import FoldTarget, foldable
from ...inspect.from_export import Unreadable, graph_of_export
from ...inspect.from_onnx import OnnxReader, readers_of, trains
from ...inspect.onnx_scope import title_of
from ...inspect.operators import Effect, node_operator
from ...model_tools.fold_graph import lift
from ..checkpoints import CHECKPOINT_TYPES, read_state

__all__ = ["FILE_TYPES", "FileEvidence", "Normalization", "is_file", "read_file"]

FILE_TYPES = (".onnx", ".pt2", *CHECKPOINT_TYPES)
_ALWAYS_TRAINING = (
    "_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_with_update_functional",
)  # fmt: skip
# Position of the `training` argument.
_BY_ARGUMENT = {"batch_norm": 5, "native_batch_norm": 5, "_native_batch_norm_legit": 5, "cudnn_batch_norm": 5}
_NEVER_TRAINING = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")


@dataclass(frozen=True)
class Normalization:
    """One batch normalization in a file. `foldable_into`: the layer right before it, where nothing else reads that;
    `tracks`: it has running statistics, whether it uses them or not."""

    name: str
    training: bool
    operator: str
    foldable_into: str | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    tracks: bool = True
    num_batches_tracked: Tensor | None = None


@dataclass
class FileEvidence:
    """The batch normalizations of a file. `origin` is "ONNX file", "exported program" or "checkpoint", of which names,
    shapes and buffers are known, but no program."""

    origin: str
    normalizations: list[Normalization] = field(default_factory=list)


def is_file(model: Any) -> bool:
    """Return whether `model` is a path or an exported program."""
    return isinstance(model, (str, Path, ExportedProgram))


def read_file(source: str | Path | ExportedProgram) -> FileEvidence:
    """Read an exported program, a .pt2 or an .onnx file.

    Raises:
        UserError: no such file, a name of another kind, content that cannot be read, or onnx is not installed.
    """
    if isinstance(source, ExportedProgram):
        return _from_program(source)
    path = Path(source)
    if path.suffix.lower() not in FILE_TYPES:
        raise UserError(f"neither an .onnx nor a .pt2 file nor a checkpoint, {path}, pass one or pkg.mod:function")
    if not path.is_file():
        raise UserError(f"no such file, {path}, correct the path")
    if path.suffix.lower() in CHECKPOINT_TYPES:
        return _from_checkpoint(path)
    return _from_onnx(path) if path.suffix.lower() == ".onnx" else _from_program(_load_program(path))


def _from_checkpoint(path: Path) -> FileEvidence:
    state = read_state(path, "{}")
    held = FileEvidence("checkpoint")
    for name in state:
        layer, _, buffer = name.rpartition("running_var")
        mean = state.get(f"{layer}running_mean")
        if buffer == "" and name.endswith("running_var") and mean is not None:
            count = state.get(f"{layer}num_batches_tracked")
            held.normalizations.append(
                Normalization(layer.rstrip("."), False, "", None, mean, state[name], num_batches_tracked=count)
            )
    return held


def _load_program(path: Path) -> ExportedProgram:
    try:
        return torch.export.load(path)
    except Exception as error:
        raise UserError(
            f"not a program that torch.export.save wrote ({quote_error(error)}), {path}, export the model again"
        ) from error


# --- torch.export ------------------------------------------------------------------------------------------
def _from_program(program: ExportedProgram) -> FileEvidence:
    held = FileEvidence("exported program")
    targets = _fold_targets(program)
    for node in program.graph.nodes:
        operator = _operator(node)
        training = _training(node, operator)
        if training is None or _is_instance_norm(node):
            continue
        name = _module_path(node)
        arguments = _arguments(node)
        mean, var = (_tensor_of(program, arguments.get(name)) for name in ("running_mean", "running_var"))
        into = None if training else targets.get(name)
        tracks = arguments.get("running_mean") is not None
        held.normalizations.append(Normalization(name, training, operator, into, mean, var, tracks))
    return held


def _fold_targets(program: ExportedProgram) -> dict[str, str]:
    """The layer that each normalization of the program can be folded into, by name, as `fold` decides it."""
    if program.example_inputs is None:
        return {}
    module: Any = program.module()
    lift(module)
    args, kwargs = program.example_inputs
    try:
        graph = graph_of_export(module, kwargs or args)
    except Unreadable:
        return {}
    return {norm.name: target.name for norm, target in foldable(graph)}


def _operator(node: Any) -> str:
    return node_operator(node) if isinstance(node, fx.Node) else ""


def _training(node: Any, operator: str) -> bool | None:
    if operator in _ALWAYS_TRAINING:
        return True
    if operator in _NEVER_TRAINING:
        return False
    if operator not in _BY_ARGUMENT:
        return None
    if getattr(node.target, "_overloadname", "") == "no_stats":
        return True
    return bool(_arguments(node).get("training", False))


def _arguments(node: Any) -> dict[str, Any]:
    return {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)} | dict(node.kwargs)


def _is_instance_norm(node: Any) -> bool:
    """Return whether torch wrote an instance normalization as the batch normalization of one sample of N·C channels."""
    source = node.args[0]
    before = source.args[0] if _operator(source) in ("view", "reshape", "_unsafe_view") else None
    shape, earlier = (getattr(getattr(n, "meta", {}).get("val"), "shape", None) for n in (source, before))
    if shape is None or earlier is None or len(earlier) < 3:
        return False
    return bool(shape[0] == 1 and shape[1] == earlier[0] * earlier[1] and len(shape) == len(earlier))


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
def _from_onnx(path: Path) -> FileEvidence:
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
    held = FileEvidence("ONNX file")
    for reader in readers_of(model, {}):
        graph = reader.read()
        for call in graph.of_effect(Effect.NORM):
            target = None if call.stays else reader.fold_target(call, graph)
            held.normalizations.append(_from_node(reader.nodes_of[call], reader, target))
    return held


def _from_node(node: Any, reader: OnnxReader, target: FoldTarget | None) -> Normalization:
    names = (*node.input[3:5], "", "")[:2]
    constants = [reader.scope.constant(name).array if name else None for name in names]
    mean, var = (None if array is None else torch.from_numpy(array.astype("float64")) for array in constants)
    into = target.layer.name if target is not None and target.layer is not None else None
    tracks = not any(
        name in reader.scope.producers() and array is None for name, array in zip(names, constants, strict=True)
    )
    by_batch = trains(node, reader.scope.opset) or not tracks
    return Normalization(title_of(node), by_batch, node.op_type, into, mean, var, tracks)
