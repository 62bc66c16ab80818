"""What a Conv, ConvTranspose, Gemm or MatMul node of an ONNX file computes: a product with a constant, plus a bias.

An addition of a constant to each channel right after the node counts as part of its bias: exporters write a linear
layer as MatMul and Add.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .onnx_scope import Constant, OnnxScope, attribute_of, is_standard, title_of

__all__ = ["FIRST_WITH_BROADCAST", "LAYER_KINDS", "OnnxLayer", "is_floating", "pads"]

LAYER_KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FIRST_WITH_BROADCAST = 7  # before this opset, Gemm and Add take an operand of fewer axes by an attribute


@dataclass(eq=False)
class OnnxLayer:
    """A layer's node, and the nodes after it that add to its bias."""

    scope: OnnxScope
    node: Any
    rank: int | None  # of its result; None where it is not known
    adds: list[Any] = field(default_factory=list)
    added: list[Any] = field(default_factory=list)  # what each adds, one float64 number a channel

    @property
    def title(self) -> str:
        return title_of(self.node)

    @property
    def kind(self) -> str:
        return self.node.op_type

    @property
    def result(self) -> str:
        """The name of the value that the layer and its additions make."""
        return (self.adds or [self.node])[-1].output[0]

    @property
    def weight(self) -> Constant:
        return self.scope.constant(self.node.input[1])

    @property
    def bias(self) -> Constant | None:
        """The node's own bias, if it has one."""
        inputs = self.node.input
        return self.scope.constant(inputs[2]) if len(inputs) > 2 and inputs[2] else None

    @property
    def groups(self) -> int:
        return int(attribute_of(self.node, "group", 1))

    @property
    def features(self) -> tuple[int, int]:
        """The number of input channels and of output channels."""
        dims = self.weight.array.shape
        if self.kind == "Conv":
            return dims[1] * self.groups, dims[0]
        if self.kind == "ConvTranspose":
            return dims[0], dims[1] * self.groups
        turned = self.kind == "Gemm" and attribute_of(self.node, "transB", 0)
        return (dims[1], dims[0]) if turned else (dims[0], dims[1])

    @property
    def axis_in(self) -> int | None:
        """The axis of its input's channels; None where it is not known."""
        turned = self.kind == "Gemm" and attribute_of(self.node, "transA", 0)
        return 0 if turned else self.axis_out

    @property
    def axis_out(self) -> int | None:
        if self.kind == "MatMul":
            return None if self.rank is None else self.rank - 1
        return 1

    def take_additions(self, follower: Any) -> bool:
        """Count an Add or Sub node that alone reads the result as a part of the bias, if it adds to each channel."""
        if not is_standard(follower, "Add", "Sub") or len(follower.input) != 2 or self.why_not():
            return False
        first = follower.input[0] == self.result
        if follower.op_type == "Sub" and not first:
            return False
        values = self._by_channel(follower, self.scope.constant(follower.input[1 if first else 0]))
        if values is None:
            return False
        self.adds.append(follower)
        self.added.append(-values if follower.op_type == "Sub" else values)
        return True

    def _by_channel(self, node: Any, operand: Constant) -> Any:
        import numpy as np

        if operand.array is None or self.rank is None or self.axis_out is None:
            return None
        shape = operand.array.shape
        if self.scope.opset < FIRST_WITH_BROADCAST:
            if not attribute_of(node, "broadcast", 0):
                return None
            shape += (1,) * (self.rank - attribute_of(node, "axis", self.rank - len(shape)) - len(shape))
        shape = (1,) * (self.rank - len(shape)) + shape
        if len(shape) != self.rank or any(size != 1 for i, size in enumerate(shape) if i != self.axis_out):
            return None
        if shape[self.axis_out] not in (1, self.features[1]):
            return None
        return np.broadcast_to(operand.array.astype("float64").ravel(), self.features[1])

    def why_not(self) -> str:
        """Why its weight cannot be changed, or ''."""
        if any(attribute.ref_attr_name for attribute in self.node.attribute):
            return f"{self.title} takes an attribute from its function"
        for constant in [self.weight, *([self.bias] if self.bias is not None else [])]:
            if constant.array is None:
                return f"{self.title} computes its weight: {constant.reason}"
            if not is_floating(constant.array.dtype):
                return f"{self.title} has a weight of {constant.array.dtype}"
        shape = self.weight.array.shape
        matrix = self.kind in ("Gemm", "MatMul")
        if (len(shape) != 2 if matrix else len(shape) < 3) or (shape[0] % self.groups if not matrix else 0):
            return f"{self.title} has a weight of the shape {shape}"
        return ""

    def why_not_before(self) -> str:
        """Why it cannot take in what comes after it, or ''."""
        if self.why_not() or self.bias is None:
            return ""
        if any(size != 1 for size in self.bias.array.shape[:-1]):
            return f"the bias of {self.title} differs along the batch"
        return ""


def is_floating(dtype: Any) -> bool:
    return bool(dtype.kind == "f" or dtype.name == "bfloat16")


def pads(layer: OnnxLayer) -> bool:
    """Whether a Conv reads zeros around its input."""
    automatic = attribute_of(layer.node, "auto_pad", b"NOTSET")
    if automatic in (b"SAME_UPPER", b"SAME_LOWER"):
        return any(size != 1 for size in layer.weight.array.shape[2:])  # a kernel of one element needs no more
    return automatic != b"VALID" and any(attribute_of(layer.node, "pads", []))
