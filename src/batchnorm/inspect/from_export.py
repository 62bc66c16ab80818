"""The graph that the program itself says, as `torch.export` writes it down.

The graph has a node for each operator, below autograd and below modules, and each node says in which module's call it
stands. A layer's or a normalization's call is the run of nodes that bear its name; whose result it reads, who else
reads that, and who else reads its parameters are edges. Nothing runs, so no value can mislead; where the program
cannot be written down (control flow on values, operators of another tracer), `Unreadable` says so.
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import quote_error
from .example import no_encoder_fast_path, still
from .graph import OUTPUT, Geometry, GraphNode, ModelGraph
from .modules import is_layer, is_norm, names_of
from .nests import arguments_of
from .operators import SHAPED_LIKE, Effect, effect_of, node_operator
from .untouched import untouched
from .ways import Step, connect

__all__ = ["Unreadable", "graph_of_export", "why_no_program"]


class Unreadable(Exception):
    """There is no graph of this model on this example; the message says why, in one line."""


def graph_of_export(model: nn.Module, example: Any) -> ModelGraph:
    """The graph of the model's exported program. The model is left as it was.

    Raises:
        Unreadable: `torch.export` does not take the model, or its graph holds graphs.
    """
    return _Reader(model, _program(model, example)).read()


def why_no_program(model: nn.Module, example: Any) -> str:
    """Why `torch.export` does not take the model, or ''. Where it does, which operators run depends on shapes and
    settings alone, never on a value."""
    try:
        _program(model, example)
    except Unreadable as error:
        return str(error)
    return ""


def _program(model: nn.Module, example: Any) -> Any:
    args, kwargs = arguments_of(example)
    with untouched(model), no_encoder_fast_path(), _silence():
        still(model)
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:  # whatever the model's own forward raises under the tracer
            raise Unreadable(f"torch.export does not take it: {quote_error(error)}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """torch warns, logs and prints, at length, what it could not export: here it is a reason to look in another way."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # see above
            yield
    finally:
        logging.disable(before)


class _Reader:
    def __init__(self, model: nn.Module, program: Any) -> None:
        self.model, self.nodes = model, list(program.graph.nodes)
        self.names, self.modules = names_of(model), dict(model.named_modules(remove_duplicate=False))
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = {*held, *signature.inputs_to_lifted_tensor_constants, *signature.inputs_to_lifted_custom_objs}
        self.parameters = {n: id(_get(model, held[n.name])) for n in self.nodes if n.name in held}
        self.calls: list[GraphNode] = []
        self.made: list[GraphNode] = []  # calls, and the operators between them
        self.node_of: dict[fx.Node, GraphNode] = {}
        self.visit: Any = None
        self.call_of: dict[fx.Node, GraphNode] = {}
        self.ends: dict[GraphNode, fx.Node] = {}

    def read(self) -> ModelGraph:
        functional: list[str] = []
        for node in self.nodes:
            if node.op == "get_attr" or (node.op == "call_function" and not _is_plain(node)):
                raise Unreadable(f"its graph holds {node.target}, whose inside is another graph")
            self._place(node)
            if node.op == "call_function" and effect_of(node_operator(node)) is Effect.NORM:
                call = self.call_of.get(node)
                if call is None or call.module is None or not is_norm(call.module):
                    functional.append(self.names[self._modules(node)[-1][1]])
        for call in self.calls:
            self._connect(call)
        for call in self.calls:
            self._note_readers(call)
        return ModelGraph(tuple(self.made), tuple(dict.fromkeys(functional)))

    # --- which nodes are whose ---------------------------------------------------------------------
    def _modules(self, node: fx.Node) -> list[tuple[Any, nn.Module]]:
        """The modules in whose calls the node stands, the innermost last. The tracer numbers the calls of a module in
        its path (`conv`, `conv@1`), so the entry tells one call from the next."""
        found: list[tuple[Any, nn.Module]] = [(None, self.model)]
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            module = self.modules.get(path.partition("@")[0])  # a graph that was exported before tells of lost ones too
            if module is not None:
                found.append(((key, path), module))
        return found

    def _place(self, node: fx.Node) -> None:
        visit, owner = next(
            ((v, m) for v, m in reversed(self._modules(node)) if is_layer(m) or is_norm(m)), (None, None)
        )
        if node.op != "call_function":
            return
        if owner is None:
            mine = GraphNode(node_operator(node), effect_of(node_operator(node)))
            self.made.append(mine)
        else:
            if not self.calls or self.calls[-1].module is not owner or self.visit != visit:
                effect = Effect.LAYER if is_layer(owner) else Effect.NORM
                self.calls.append(GraphNode(self.names[owner], effect, owner, is_call=True))
                self.made.append(self.calls[-1])
            mine, self.visit = self.calls[-1], visit
            self.call_of[node] = mine
            self.ends[mine] = node
        self.node_of[node] = mine
        mine.link([self.node_of[n] for n in node.all_input_nodes if n in self.node_of])

    def _given(self, call: GraphNode) -> list[fx.Node]:
        """The tensors that come into the call from elsewhere, in the order in which it reads them."""
        inside = [node for node in self.nodes if self.call_of.get(node) is call]
        read = [n for node in inside for n in node.all_input_nodes]
        return [
            n
            for n in dict.fromkeys(read)
            if self.call_of.get(n) is not call and n.name not in self.constants and isinstance(n.meta["val"], Tensor)
        ]

    # --- edges -------------------------------------------------------------------------------------
    def _connect(self, call: GraphNode) -> None:
        given, end = self._given(call), self.ends[call]
        call.output = _geometry(end)
        if not given:
            return
        call.input = _geometry(given[0])
        way: list[fx.Node] = []
        node = given[0]
        while node not in self.call_of and _carries(node):
            way.insert(0, node)
            node = node.args[0]  # type: ignore[assignment]  # a carrier's first operand is the tensor
        source = self.call_of.get(node)
        if source is not None and self.ends[source] is node:
            connect(source, call, [_step(step) for step in way if not _is_identity(step)])

    def _note_readers(self, call: GraphNode) -> None:
        end = self.ends[call]
        inside = {node for node, its in self.call_of.items() if its is call}
        leaks = [user for node in inside - {end} for user in node.users if user not in inside]
        call.readers = [self._reader(user) for user in [*leaks, *_readers(end)]]
        call.is_output = any(user.op == "output" for user in end.users)
        if call.module is None or not is_layer(call.module):
            return
        mine = {id(parameter) for parameter in call.module.parameters(False)}
        reading = [user for node, key in self.parameters.items() if key in mine for user in node.users]
        call.parameters_shared = any(self._reader(user).module is not call.module for user in reading)

    def _reader(self, node: fx.Node) -> GraphNode:
        return OUTPUT if node.op == "output" else self.node_of[node]


def _is_plain(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) or node.target in vars(operator).values()


def _get(model: nn.Module, path: str) -> Any:
    holder, _, name = path.rpartition(".")
    return getattr(model.get_submodule(holder), name)


def _geometry(node: fx.Node) -> Geometry | None:
    value = node.meta.get("val")
    if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
        raise Unreadable(f"the shape of {node.name} depends on values")
    return Geometry.of(value) if isinstance(value, Tensor) else None


def _carries(node: fx.Node) -> bool:
    return node.op == "call_function" and (effect_of(node_operator(node)) is Effect.CARRY or _is_identity(node))


def _is_identity(node: fx.Node) -> bool:
    """A dropout in eval, or a conversion to what the tensor is already."""
    effect = effect_of(node_operator(node))
    if effect not in (Effect.DROPOUT, Effect.CONVERT) or not isinstance(node.args[0], fx.Node):
        return False
    if effect is Effect.DROPOUT:
        return node.args[2] is False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Every node that reads the value, itself or through carriers."""
    for user in node.users:
        name = node_operator(user)
        if effect_of(name) is Effect.CHECK or (name in SHAPED_LIKE and user.args[0] is not node):
            continue
        if _carries(user):
            yield from _readers(user)
        else:
            yield user


def _step(node: fx.Node) -> Step:
    """What a carrier does, to another tensor of the same form."""
    rest: list[Any] = [n.meta["val"] if isinstance(n, fx.Node) else n for n in node.args[1:]]

    def step(numbers: Tensor) -> Tensor:
        operands = [numbers.new_empty(1).expand(rest[0].shape)] if node_operator(node) in SHAPED_LIKE else rest
        return node.target(numbers, *operands, **node.kwargs)  # type: ignore[operator]  # an OpOverload, as every carrier is

    return step
