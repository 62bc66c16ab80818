"""The graphs of an ONNX file: the main one, branches and functions, each with its constants and with who reads what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import quote_error

__all__ = ["CONSTANT_OPS", "Constant", "OnnxScope", "Read", "attribute_of", "is_standard", "scopes_of", "title_of"]

_DEFAULT_DOMAINS = ("", "ai.onnx")
_FIRST_WITHOUT_INPUTS = 4  # from this IR version on, an initializer that is an input too is a default value
# Exporters compute weights and shapes by them; what they make of constants is one.
CONSTANT_OPS = (
    "Add", "Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "Div", "Expand", "Flatten", "Gather",
    "Identity", "Mul", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze",
)  # fmt: skip


class Constant(NamedTuple):
    """A value that is the same in every run, with ONNX's number of its type; or None, and why it is not."""

    array: Any
    data_type: int
    reason: str


class Read(NamedTuple):
    """A node that reads a value, and as which of its inputs; -1 where a graph inside the node does."""

    node: Any
    slot: int


def title_of(node: Any) -> str:
    """The node's name, or that of its first output."""
    name: str = node.name or next((output for output in node.output if output), node.op_type)
    return name


def attribute_of(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    from onnx import helper

    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def is_standard(node: Any, *kinds: str) -> bool:
    """Whether the node is one of these operators of the ONNX standard."""
    return node.op_type in kinds and node.domain in _DEFAULT_DOMAINS


def scopes_of(model: Any) -> list[OnnxScope]:
    """Every graph of the model: the main one, what lies inside its nodes, then the local functions."""
    roots = [OnnxScope(model, model.graph, "", None)]
    roots += [OnnxScope(model, function, f"the function {function.name}", None) for function in model.functions]
    return [scope for root in roots for scope in root.tree()]


class OnnxScope:
    """One graph, or one function. A name that is not of the graph itself is looked up in the graph around it."""

    def __init__(self, model: Any, body: Any, where: str, parent: OnnxScope | None) -> None:
        self.model, self.body, self.where, self.parent = model, body, where, parent
        self.root: OnnxScope = parent.root if parent is not None else self
        self.is_graph = hasattr(body, "initializer")
        imports = self.root.body.opset_import if not self.root.is_graph else model.opset_import
        self.opset = max((entry.version for entry in imports if entry.domain in _DEFAULT_DOMAINS), default=0)
        self.inputs = {value.name if self.is_graph else value for value in body.input}
        self.outputs = {value.name if self.is_graph else value for value in body.output}
        self.constants: dict[str, Constant] = {}  # those that were asked for
        self.types: dict[str, int] = {}  # ONNX's numbers of the types of values, where they were inferred
        self.children = [
            (node, OnnxScope(model, graph, f"a branch of {title_of(node)}", self))
            for node in body.node
            for attribute in node.attribute
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
        ]

    def tree(self) -> Iterator[OnnxScope]:
        yield self
        for _, child in self.children:
            yield from child.tree()

    # --- names -------------------------------------------------------------------------------------
    def initializers(self) -> dict[str, Any]:
        """The graph's own initializers, dense and sparse ones."""
        if not self.is_graph:
            return {}
        dense = {tensor.name: tensor for tensor in self.body.initializer}
        return dense | {tensor.values.name: tensor for tensor in self.body.sparse_initializer}

    def producers(self) -> dict[str, Any]:
        return {name: node for node in self.body.node for name in node.output if name}

    def names(self) -> set[str]:
        """Every name that the graph defines."""
        return {*self.inputs, *self.initializers(), *self.producers()}

    def readers(self) -> dict[str, list[Read]]:
        """Who reads each value; a graph inside a node reads values of the graph around it."""
        found: dict[str, list[Read]] = defaultdict(list)
        for node in self.body.node:
            for slot, name in enumerate(node.input):
                found[name].append(Read(node, slot))
        for node, child in self.children:
            for name in child.reads_outside():
                found[name].append(Read(node, -1))
        return found

    def reads_outside(self) -> set[str]:
        """Names that the graph, or one inside it, reads and does not define."""
        read = {name for node in self.body.node for name in node.input if name} | self.outputs
        return read.union(*(child.reads_outside() for _, child in self.children)) - self.names()

    # --- constants ---------------------------------------------------------------------------------
    def overridable(self, name: str) -> bool:
        """Whether the graph's caller may give another value to an initializer."""
        old = self.parent is None and self.model.ir_version < _FIRST_WITHOUT_INPUTS  # it had to be an input
        return name in self.inputs and not old

    def constant(self, name: str) -> Constant:
        """The value behind a name, wherever it is defined."""
        if name not in self.constants:
            self.constants[name] = self._find(name)
        return self.constants[name]

    def _find(self, name: str) -> Constant:
        initial = self.initializers().get(name)
        if initial is not None and self.overridable(name):
            return _unknown(
                f"{name} is an input of the graph too, so a caller may override it; take it out of the inputs"
            )
        if initial is not None:
            return _read(name, initial)
        producer = self.producers().get(name)
        if producer is not None:
            return self._made_by(producer, name)
        if self.parent is None or name in self.inputs:
            inline = "" if self.root.is_graph else "; inline it first (onnx.inliner)"
            return _unknown(f"{name} is an input of {self.where or 'the graph'}{inline}")
        return self.parent.constant(name)

    def _made_by(self, node: Any, name: str) -> Constant:
        if is_standard(node, "Identity"):
            return self.constant(node.input[0])
        if is_standard(node, "Constant"):
            held = next(iter(node.attribute), None)
            if held is not None and held.name in ("value", "sparse_value") and not held.ref_attr_name:
                return _read(name, held.t if held.name == "value" else held.sparse_tensor)
        elif is_standard(node, "DequantizeLinear"):
            return _unknown(f"{name} is quantized ({title_of(node)}), fold before quantizing")
        elif not is_standard(node, *CONSTANT_OPS):
            return _unknown(f"{name} is computed by the {node.op_type} {title_of(node)}")
        operands = {operand: self.constant(operand) for operand in node.input if operand}
        if is_standard(node, "CastLike") and operands[node.input[1]].array is None:
            operands[node.input[1]] = self._like(node.input[1])
        missing = next((operand.reason for operand in operands.values() if operand.array is None), "")
        if missing:
            return _unknown(missing)
        return _evaluate(node, {operand: value.array for operand, value in operands.items()}, self.opset)

    def _like(self, name: str) -> Constant:
        """An empty array of a value's type: CastLike takes nothing else of its second operand."""
        import numpy as np
        from onnx import helper

        if name not in self.types:
            return _unknown(f"the type of {name} is not known")
        data_type = self.types[name]
        return Constant(np.zeros(0, helper.tensor_dtype_to_np_dtype(data_type)), data_type, "")

    def add_constant(self, name: str, array: Any, data_type: int) -> str:
        """A new constant of float64 numbers, rounded to the type in the file; returns the name that it got.

        Initializers go to the main graph, which branches see. A function has none, so it gets a Constant node.
        """
        from onnx import helper

        root = self.root
        taken = set().union(*(scope.names() for scope in root.tree()))
        while name in taken:
            name += "_"
        tensor = _rounded(name, array, data_type)
        if not root.is_graph:
            root.body.node.insert(0, helper.make_node("Constant", [], [name], name=name, value=tensor))
        else:
            root.body.initializer.append(tensor)
            if self.model.ir_version < _FIRST_WITHOUT_INPUTS:
                root.body.input.append(helper.make_tensor_value_info(name, data_type, array.shape))
                root.inputs.add(name)
        root.constants[name] = Constant(array, data_type, "")  # as it was before rounding, for the next fold
        return name


def _unknown(reason: str) -> Constant:
    return Constant(None, 0, reason)


def _read(name: str, tensor: Any) -> Constant:
    import numpy as np
    from onnx import numpy_helper

    values = getattr(tensor, "values", tensor)
    try:
        array = numpy_helper.to_array(values)
        if values is not tensor:
            dense = np.zeros(tuple(tensor.dims), array.dtype)
            indices = numpy_helper.to_array(tensor.indices)
            dense[tuple(indices.T) if indices.ndim > 1 else np.unravel_index(indices, dense.shape)] = array
            array = dense
    except Exception as error:  # what a broken tensor raises depends on how it is broken
        return _unknown(f"{name} cannot be read: {quote_error(error)}")
    return Constant(array, values.data_type, "")


def _evaluate(node: Any, operands: dict[str, Any], opset: int) -> Constant:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    untyped = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*operands, node.output[0])]
    graph = helper.make_graph([node], "constant", untyped[:-1], untyped[-1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        array: Any = next(iter(ReferenceEvaluator(model).run(None, operands)))
        return Constant(array, helper.np_dtype_to_tensor_dtype(array.dtype), "")
    except Exception as error:  # the evaluator raises what NumPy raises
        return _unknown(f"{title_of(node)} cannot be computed: {quote_error(error)}")


def _rounded(name: str, array: Any, data_type: int) -> Any:
    import numpy as np
    from onnx import helper, numpy_helper

    with np.errstate(over="ignore"):  # the comparison of the outputs finds what overflows
        tensor = numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(data_type)), name)
    if tensor.data_type != data_type:  # older versions of onnx have no NumPy type for bfloat16
        tensor = helper.make_tensor(name, data_type, array.shape, array.ravel().tolist())
    return tensor
