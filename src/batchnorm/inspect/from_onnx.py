"""The graph of an ONNX file: its layers and BatchNormalization nodes, and who reads what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .folding import FoldTarget, fold_target, per_channel_read
from .graph import ELSEWHERE, GraphNode, ModelGraph
from .onnx_layers import LAYER_KINDS, OnnxLayer, is_floating, pads
from .onnx_scope import OnnxScope, Read, attribute_of, is_standard, scopes_of, title_of
from .onnx_shapes import Inferred, infer
from .operators import Effect

__all__ = ["OnnxReader", "readers_of", "trains"]

_EPSILON = 9.999999747378752e-06  # the default 1e-5 in float32, as ONNX holds attributes
_PARTS = ("scale", "B", "mean", "var")
_SHAPE_ONLY = ("Shape", "Size")  # they read no element
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_FIRST_WITH_TRAINING_INPUT = 12  # of Dropout


def readers_of(model: Any, inputs: Mapping[str, tuple[int, ...]]) -> list[OnnxReader]:
    """A reader for each graph of the model: the main one, those inside its nodes, and the local functions.

    `inputs` are shapes by the names of inputs; an axis without a fixed size is 2 in the others.
    """
    return [OnnxReader(scope, known) for scope, known in zip(scopes_of(model), infer(model, inputs), strict=True)]


def trains(node: Any, opset: int) -> bool:
    """Whether a BatchNormalization node normalizes by the batch."""
    if opset >= 14:
        return bool(attribute_of(node, "training_mode", 0))
    if opset >= 7:  # before the attribute, more outputs than one said it
        return _outputs(node) > 1
    return not attribute_of(node, "is_test", 0)


def _outputs(node: Any) -> int:
    return len([name for name in node.output if name])


class OnnxReader:
    """Reads one graph of a file.

    `nodes_of` and `layer_of` give the ONNX node and the layer behind each node of the graph that `read` returns.
    """

    def __init__(self, scope: OnnxScope, known: Inferred) -> None:
        self.scope, self.shapes = scope, known.shapes
        scope.types = known.types
        self.nodes_of: dict[GraphNode, Any] = {}
        self.layer_of: dict[GraphNode, OnnxLayer] = {}
        self.unknown: dict[GraphNode, str] = {}  # layers for whose input the channels of their source are not known
        self.readers: dict[str, list[Read]] = {}
        self.makers: dict[str, GraphNode] = {}  # by the name of each value that they make
        self.results: dict[str, GraphNode] = {}

    def read(self) -> ModelGraph:
        """The graph as it stands now."""
        self.readers = self.scope.readers()
        self.nodes_of, self.layer_of, self.unknown, self.makers, self.results = {}, {}, {}, {}, {}
        self.producers = self.scope.producers()
        for node in self.scope.body.node:
            if any(name in self.makers for name in node.output if name):
                continue  # an addition to a layer's bias
            call = self._call(node)
            call.link([self.makers[name] for name in node.input if name in self.makers])
            self.makers.update((name, call) for name in self._values(call))
        for call in self.nodes_of:
            if call.is_call:
                self._connect(call)
                self._note_readers(call)
        return ModelGraph(tuple(self.nodes_of), ())

    # --- nodes -------------------------------------------------------------------------------------
    def _call(self, node: Any) -> GraphNode:
        call = GraphNode(title_of(node), Effect.OTHER)
        self.nodes_of[call] = node
        if is_standard(node, "Dropout"):
            call.effect = Effect.DROPOUT
        elif is_standard(node, "BatchNormalization"):
            call.effect, call.is_call, call.stays = Effect.NORM, True, self._why_norm_stays(node)
        elif is_standard(node, *LAYER_KINDS) and not self._multiplies_from_the_left(node):
            layer = self._layer(node)
            self.layer_of[call] = layer
            call.effect, call.is_call = Effect.LAYER, True
            call.stays, call.stays_before = layer.why_not(), layer.why_not_before()
        if call.is_call:
            self.results[self._values(call)[-1]] = call
        return call

    def _values(self, call: GraphNode) -> list[str]:
        layer = self.layer_of.get(call)
        nodes = [self.nodes_of[call]] if layer is None else [layer.node, *layer.adds]
        return [name for node in nodes for name in node.output[: 1 if call.is_call else None] if name]

    def _multiplies_from_the_left(self, node: Any) -> bool:
        return node.op_type == "MatMul" and self.scope.constant(node.input[0]).array is not None

    def _layer(self, node: Any) -> OnnxLayer:
        layer = OnnxLayer(self.scope, node, None)
        if node.op_type != "MatMul":
            layer.rank = 2 if node.op_type == "Gemm" else self._rank_of_weight(node)
        elif (shape := self.shapes.get(node.input[0]) or self.shapes.get(node.output[0])) is not None:
            layer.rank = len(shape)
        while (alone := self._only_reader(layer.result)) is not None and layer.take_additions(alone):
            pass
        return layer

    def _rank_of_weight(self, node: Any) -> int | None:
        weight = self.scope.constant(node.input[1]).array
        return None if weight is None else weight.ndim

    def _only_reader(self, name: str) -> Any:
        """The node of this graph that alone reads a value, once."""
        reads = self.readers[name]
        return reads[0].node if len(reads) == 1 and reads[0].slot >= 0 and name not in self.scope.outputs else None

    def _why_norm_stays(self, norm: Any) -> str:
        if any(attribute.ref_attr_name for attribute in norm.attribute):
            return "it takes an attribute from its function"
        if trains(norm, self.scope.opset):
            return "in training mode; export the model in eval"
        if _outputs(norm) > 1:
            return "it gives its statistics as outputs too"
        if len(norm.input) < 5:
            return f"it has {len(norm.input)} inputs instead of 5"
        constants = [self.scope.constant(name) for name in norm.input[1:5]]
        for part, constant in zip(_PARTS, constants, strict=True):
            if constant.array is None:
                return f"its parameters are computed: as its {part}, {constant.reason}"
            if not is_floating(constant.array.dtype):
                return f"its {part} is of {constant.array.dtype}"
        shapes = {constant.array.shape for constant in constants}
        if any(size != 1 for shape in shapes for size in shape[1:]) and not attribute_of(norm, "spatial", 1):
            return "spatial=0: its statistics differ by position"
        if len(shapes) > 1 or len(next(iter(shapes))) < 1 or any(size != 1 for shape in shapes for size in shape[1:]):
            return f"its parameters have the shapes {', '.join(str(constant.array.shape) for constant in constants)}"
        return self._why_not_finite(norm)

    def _why_not_finite(self, norm: Any) -> str:
        import numpy as np

        s, t = self.scale_and_shift(norm)
        return "" if np.isfinite(s).all() and np.isfinite(t).all() else "its scale or shift is not finite"

    def scale_and_shift(self, norm: Any) -> tuple[Any, Any]:
        """(s, t) of a BatchNormalization node that need not stay, y = s·x + t, as float64 numbers."""
        import numpy as np

        scale, shift, mean, var = (
            self.scope.constant(name).array.astype("float64").reshape(-1) for name in norm.input[1:5]
        )
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # the caller looks at what comes out
            s = scale / np.sqrt(var + attribute_of(norm, "epsilon", _EPSILON))
            return s, shift - mean * s

    def fold_target(self, call: GraphNode, graph: ModelGraph) -> FoldTarget:
        """Where a normalization that need not stay goes, by the one decision of `folding.py`."""
        _, t = self.scale_and_shift(self.nodes_of[call])

        def why_not_after(node: GraphNode) -> str:
            if node in self.unknown:
                return self.unknown[node]
            layer, (shift,) = self.layer_of[node], per_channel_read(node, t)
            if layer.kind == "ConvTranspose" and shift.any():
                return f"the ConvTranspose {layer.title} gives every position another share of the shift"
            if layer.kind == "Conv" and pads(layer) and shift.any():
                return f"{layer.title} pads with zeros, which would get the shift too"
            return ""

        return fold_target(call, graph, (), why_not_after)

    # --- edges -------------------------------------------------------------------------------------
    def _connect(self, call: GraphNode) -> None:
        import numpy as np

        way: list[Any] = []
        value = self.nodes_of[call].input[0]
        while value not in self.results and value in self.producers and self._carries(self.producers[value]):
            way.insert(0, self.producers[value])
            value = way[0].input[0]
        call.source = self.results.get(value)
        if call.source is None or call.source.stays or call.stays or call.source.effect is call.effect:
            call.aligned = call.source is not None  # there is nothing to fold, or the reason to stay says more
            return
        size_out, size_in = self._size(call.source, 1), self._size(call, 0)
        numbers = self._numbers_at(call, value, way, size_out)
        if numbers is None:
            call.aligned = True
            unknown = f"the shapes between {call.source.name} and {call.name} are not known"
            if call.effect is Effect.LAYER:
                self.unknown[call] = unknown
            else:
                call.source.stays_before = call.source.stays_before or unknown
            return
        if len(numbers) != size_in:
            return
        same = size_out == size_in and bool((numbers == np.arange(size_in)).all())
        call.spread = () if same else tuple(int(number) for number in numbers)
        # A layer before needs one number for each of its channels; a layer after takes them as they are spread.
        call.aligned = same or (call.effect is Effect.NORM and sorted(call.spread) == list(range(size_out)))

    def _numbers_at(self, call: GraphNode, value: str, way: list[Any], size: int) -> Any:
        """The channel of the source behind each channel of the call's input; [] where none is, None if not known.

        The way between is walked by an array that holds at each place the number of its channel.
        """
        import numpy as np

        assert call.source is not None  # the caller saw to it
        axis, after = self._axis(call.source, "axis_out"), self._axis(call, "axis_in")
        if axis is None or after is None:
            return None
        if not any(is_standard(node, "Transpose", *_RESHAPING) for node in way):
            return np.arange(size) if axis == after else []
        shape = self.shapes.get(value)
        if shape is None or len(shape) <= axis or shape[axis] != size:
            return None
        numbers = np.broadcast_to(np.arange(size).reshape(-1, *[1] * (len(shape) - axis - 1)), shape)
        for node in way:
            if is_standard(node, "Transpose"):
                numbers = numbers.transpose(attribute_of(node, "perm", None))
            elif is_standard(node, *_RESHAPING):
                target = self.shapes.get(node.output[0])
                if target is None:
                    return None
                numbers = numbers.reshape(target)
        if numbers.ndim <= after or numbers.size == 0:
            return []
        rows = np.moveaxis(numbers, after, -1).reshape(-1, numbers.shape[after])
        return rows[0] if (rows == rows[0]).all() else []

    def _axis(self, call: GraphNode, which: str) -> int | None:
        return 1 if call.effect is Effect.NORM else getattr(self.layer_of[call], which)

    def _size(self, call: GraphNode, side: int) -> int:
        if call.effect is Effect.LAYER:
            return self.layer_of[call].features[side]
        return int(self.scope.constant(self.nodes_of[call].input[1]).array.size)

    def _carries(self, node: Any) -> bool:
        """Whether the node gives on every element of its first input as it is."""
        if is_standard(node, "Identity", "Transpose", *_RESHAPING):
            return True
        if not is_standard(node, "Dropout"):
            return False
        if self.scope.opset < 7:
            return bool(attribute_of(node, "is_test", 0))
        if self.scope.opset < _FIRST_WITH_TRAINING_INPUT or len(node.input) < 3 or not node.input[2]:
            return True
        mode = self.scope.constant(node.input[2]).array
        return mode is not None and not mode.any()

    def _note_readers(self, call: GraphNode) -> None:
        values = self._values(call)
        call.readers = list(self._reading(values[-1]))
        call.is_output = values[-1] in self.scope.outputs

    def _reading(self, name: str) -> Iterator[GraphNode]:
        """Who reads a value, itself or through nodes that give it on."""
        if name in self.scope.outputs:
            yield ELSEWHERE
        for node, slot in self.readers[name]:
            if slot == 0 and is_standard(node, *_SHAPE_ONLY):
                continue
            if slot == 0 and self._carries(node):
                yield from self._reading(node.output[0])
            else:
                made = self.makers.get(next((output for output in node.output if output), ""))
                yield made or GraphNode(title_of(node), Effect.OTHER)
