"""The graph that a run of an example shows: which call reads whose result.

The model runs once under a dispatch mode, below autograd and below modules. Each storage knows the node that wrote it
last. Storages, not tensors, are followed: views, in-place operations and slices written one by one then need no rules
of their own. A convolution or matrix product whose weight does not come from the input is a layer, also where the model
calls it as a function.

Who else reads a result is seen by the operator, by the method that hands its memory to Python, and, however it is held
(an attribute, a list, a closure, a global), by its storage being alive when the forward is over. Not seen is what reads
memory by an address, and what another thread runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

from .example import run_example
from .feature_axes import FeatureAxes
from .functions import FunctionCalls, describe, effect_of_function, features_last, in_eval
from .graph import KEPT, OUTPUT, Geometry, GraphNode, ModelGraph
from .modules import is_dropout, is_layer, is_norm, names_of, names_of_tensors
from .nests import copied, tensors_in
from .operators import Effect, effect_of, operator_name
from .storages import Key, key_of, still_alive
from .untouched import untouched
from .value_reads import PythonReads, ValueReads
from .ways import Step, connect

__all__ = ["graph_of_run"]


def graph_of_run(model: nn.Module, example: Any, what: str) -> ModelGraph:
    """Run the example once, in the model's own mode with normalizations and dropouts in eval, and leave the model, its
    buffers and the random generators as they were.

    Raises:
        UserError: the model does not run on the example; `what` names the caller in the message.
    """
    example = copied(example)
    recorder = _RunRecorder(model, example)
    with untouched(model):
        handles = recorder.hook()
        try:
            with recorder, FunctionCalls(recorder.call_function), PythonReads(recorder.note_method):
                returned = _keys(run_example(model, example, what))
        finally:
            for handle in handles:
                handle.remove()
        recorder.finish(returned)  # before what the forward put on the model is taken off again
        drew = recorder.values.drew_in_python()
    reads = tuple(recorder.values.found)
    return ModelGraph(tuple(recorder.nodes), tuple(dict.fromkeys(recorder.functional_norms)), reads, drew)


class _RunRecorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.nodes: list[GraphNode] = []
        self.functional_norms: list[str] = []
        self._names = names_of(model)
        self._stack: list[tuple[nn.Module, GraphNode | None]] = []
        self._made: dict[Key, GraphNode] = {}  # who wrote the storage last
        self._results: dict[Key, GraphNode] = {}  # the call whose very result it still holds, or a copy of it
        self._ways: dict[Key, dict[Geometry, tuple[Step, ...]]] = {}  # from the result to what lies so in the storage
        self._axes, self._root = FeatureAxes(), model
        self._tensor_names = names_of_tensors(model)
        self.values = ValueReads(model)
        self._from_input = _keys(example)
        self._changed: set[Key] = set()  # what an operator has written into
        self._there = {*self._from_input, *map(key_of, (*model.parameters(), *model.buffers()))}  # before the forward
        layers = [module for module in self._names if is_layer(module)]
        self._readers_of: dict[Key, set[GraphNode]] = {key_of(p): set() for m in layers for p in m.parameters(False)}

    # --- modules -----------------------------------------------------------------------------------
    def hook(self) -> list[Any]:
        handles: list[Any] = []
        for module in self._names:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks, and no layer is inside
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            # First among the hooks: the layer's own result, before what users' hooks make of it.
            handles.append(module.register_forward_hook(self._leave, prepend=True))
        return handles

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = None
        if is_layer(module) or is_norm(module):
            inputs = tensors_in((args, kwargs))
            call = GraphNode(self._names[module], Effect.LAYER if is_layer(module) else Effect.NORM, module)
            call.is_call = True
            self._begin(call, inputs)
        self._stack.append((module, call))

    def _begin(self, call: GraphNode, inputs: list[Tensor]) -> None:
        if inputs:
            call.input = Geometry.of(inputs[0])
            key = key_of(inputs[0])
            call.feature_axis = self._axes.axis(inputs[0])
            if key in self._results:
                connect(self._results[key], call, self._ways[key].get(call.input))
        self.nodes.append(call)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = None
        while self._stack:  # a forward that raised and was caught left its entry behind
            entered, call = self._stack.pop()
            if entered is module:
                break
        if call is not None and isinstance(output, Tensor):
            self._end(call, output)

    def _end(self, call: GraphNode, output: Tensor) -> None:
        call.output = Geometry.of(output)
        key = key_of(output)
        if call.effect is Effect.LAYER:
            self._axes.put(output, call.channel_axis(output.dim()))
        if call.effect is not Effect.DROPOUT:  # it hands on the result that it was given
            self._results[key] = call
            self._ways[key] = {call.output: ()}
        if key in self._made:  # a layer that hands its input on made nothing
            call.link([self._made[key]])
        self._made[key] = call

    def _inside(self) -> GraphNode | None:
        """The call of a layer or normalization in which an operator runs."""
        return next((call for _, call in reversed(self._stack) if call is not None), None)

    # --- functions ---------------------------------------------------------------------------------
    def call_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function; one that is a layer, a normalization or a dropout as the call of a module of that kind."""
        effect = effect_of_function(func)
        if features_last(func):
            output = func(*args, **kwargs)
            self._axes.put(tensors_in(output)[0], -1)
            return output
        module = self._stack[-1][0] if self._stack else self._root
        name = self._where() if is_dropout(module) else ".".join(filter(None, (self._where(), func.__name__)))
        node = GraphNode(name, effect)
        given = describe(node, args, kwargs)
        inputs = [t for t in (given.get("input"), given.get("weight")) if isinstance(t, Tensor)]
        computed = effect is Effect.LAYER and self._from_input.issuperset(map(key_of, inputs[1:]))
        if self._inside() is not None or not inputs or computed:
            return func(*args, **kwargs)
        node.tensors = {self._tensor_names[id(t)]: t for t in tensors_in((args, kwargs)) if id(t) in self._tensor_names}
        self._begin(node, inputs[:1])
        self._stack.append((module, node))
        try:
            output = in_eval(given) if effect is Effect.DROPOUT else func(*args, **kwargs)
        finally:
            self._stack.pop()
        self._end(node, output)
        return output

    # --- operators ---------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        keys = [key_of(t) for t in inputs]
        with torch._C.DisableTorchFunction():  # TorchScript comes here with the function modes still on
            output = func(*args, **kwargs)
        if operator_name(func) == "set_":  # gives a tensor another storage, and writes to none
            return output
        written, outputs = _written(func, args, kwargs), tensors_in(output)
        self.values.note_operator(func, keys, inputs, [*outputs, *written], self._where())
        if not written and len(outputs) == 1 and args and isinstance(args[0], Tensor):
            self._carry(func, args[0], args[1:], kwargs, outputs[0])
        self._note(func, keys, written, outputs)
        self._axes.carry(inputs, outputs)
        return output

    def note_method(self, name: str, tensors: list[Tensor]) -> None:
        """Python takes the memory of these tensors."""
        keys = [key_of(tensor) for tensor in tensors]
        self.values.note_method(name, keys, self._where())
        for key in keys:
            if key in self._results:
                self._results[key].readers.append(GraphNode(name, Effect.OTHER))

    def _where(self) -> str:
        return self._names[self._stack[-1][0]] if self._stack else ""

    def _carry(self, func: Any, given: Tensor, rest: Any, kwargs: Any, output: Tensor) -> None:
        """Note a view or a copy of a result: its way is longer by this operator."""
        effect, key, new = effect_of(operator_name(func)), key_of(given), key_of(output)
        if key not in self._results or effect not in (Effect.CARRY, Effect.CONVERT) or tensors_in((rest, kwargs)):
            return
        if (given.dtype, given.device) != (output.dtype, output.device):
            return
        way, ways = self._ways[key].get(Geometry.of(given)), self._ways.setdefault(new, {})
        if way is not None:
            ways.setdefault(Geometry.of(output), (*way, lambda numbers: func(numbers, *rest, **kwargs)))
        self._results[new] = self._results[key]

    def _note(self, func: Any, keys: list[Key], written: list[Tensor], outputs: list[Tensor]) -> None:
        op = operator_name(func)
        call = self._inside()
        node = call if call is not None else GraphNode(op, self._effect(func.namespace, op, keys))
        changed = {key_of(tensor) for tensor in written}
        self._changed |= changed
        views = {key_of(tensor) for tensor in outputs} - changed  # what reads a view or a copy of it is its reader
        held_on = {self._results[key] for key in views if key in self._results}
        for read in {self._results[key] for key in keys if key in self._results} - held_on:
            read.readers.append(node)
        for key in self._readers_of.keys() & keys:
            self._readers_of[key].add(node)
        if node.effect is Effect.NORM and not any(is_norm(module) for module, _ in self._stack):
            self.functional_norms.append(self._where())
        node.link(list(dict.fromkeys(self._made[key] for key in keys if key in self._made)))
        if node is not call and node.inputs:
            self.nodes.append(node)
        live = any(key in self._from_input for key in keys)
        for key in changed:
            self._results.pop(key, None)
        for tensor in (*outputs, *written):
            key = key_of(tensor)
            self._made[key] = node
            if live:
                self._from_input.add(key)

    def _effect(self, space: str, op: str, keys: list[Key]) -> Effect:
        effect = Effect.NORM if space == "batchnorm" else effect_of(op)
        if effect is Effect.LAYER and all(key in self._from_input for key in _matrices(op, keys)):
            return Effect.OTHER  # two values of the input are multiplied
        if effect is Effect.NORM and any(isinstance(module, _InstanceNorm) for module, _ in self._stack):
            return Effect.OTHER  # torch writes an instance normalization as a batch normalization of a reshaped input
        live = sum(key in self._from_input for key in keys)
        if op in ("mul", "mul_", "div", "div_") and live == 1:
            return Effect.MIX  # by a constant or a parameter
        return effect

    def finish(self, returned: set[Key]) -> None:
        """Note which results are, or reach, what the model returned, which ones something holds now that the forward is
        over, and who else used a layer's parameters."""
        for call in self.nodes:
            for parameter in call.module.parameters(False) if call.module and is_layer(call.module) else ():
                readers = self._readers_of[key_of(parameter)]
                call.parameters_shared |= any(reader.module is not call.module for reader in readers)
        candidates = (self._made.keys() | self._results.keys()) - returned
        # a view of a parameter is no result: of what was there before, what the forward has written to counts
        kept = {*(candidates & self._there & self._changed), *still_alive(candidates - self._there)}
        for key in self._made.keys() & (returned | kept):
            self._made[key].reaches_output = True
        for key, call in self._results.items():
            call.is_output |= key in returned
            call.readers += [reader for reader, keys in ((OUTPUT, returned), (KEPT, kept)) if key in keys]


def _keys(tree: Any) -> set[Key]:
    return {key_of(tensor) for tensor in tensors_in(tree)}


def _matrices(op: str, keys: list[Key]) -> list[Key]:
    """The operands that are multiplied: without the bias, and of a convolution the weight alone."""
    if "convolution" in op:
        return keys[1:2]
    return keys[1:3] if op in ("addmm", "addmv", "baddbmm", "addbmm") else keys


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operator writes into, by its schema."""
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += tensors_in(value)
    return written
