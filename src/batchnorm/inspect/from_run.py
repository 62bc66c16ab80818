"""The graph that a run of an example shows: which call reads whose result.

The model runs once under a dispatch mode, below autograd and below modules. Each storage knows the node that wrote it
last. Storages, not tensors, are followed: views, in-place operations and slices written one by one then need no rules
of their own. A convolution or matrix product whose weight does not come from the input is a layer, also where the model
calls it as a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .example import copied, run_example
from .graph import Geometry, GraphNode, ModelGraph
from .modules import channel_axis, is_layer, is_norm, names_of
from .operators import Effect, effect_of
from .untouched import untouched

__all__ = ["graph_of_run", "tensors_in"]

Key = StorageWeakRef | int


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
            with recorder:
                output = run_example(model, example, what)
        finally:
            for handle in handles:
                handle.remove()
    recorder.finish(output)
    return ModelGraph(tuple(recorder.nodes), tuple(recorder.functional_norms), output)


class _RunRecorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.nodes: list[GraphNode] = []
        self.functional_norms: list[str] = []
        self._names = names_of(model)
        self._stack: list[tuple[nn.Module, GraphNode | None]] = []
        # Weak references keep the storages' addresses from being used again, but not their memory.
        self._made: dict[Key, GraphNode] = {}  # who wrote the storage last
        self._results: dict[Key, GraphNode] = {}  # the call whose very result it still holds
        self._from_input = {_key(t) for t in tensors_in(example)}
        layers = [module for module in self._names if is_layer(module)]
        self._readers_of: dict[Key, set[str]] = {_key(p): set() for m in layers for p in m.parameters(False)}

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
            if inputs:
                call.input = Geometry.of(inputs[0])
                call.source = self._results.get(_key(inputs[0]))
                call.aligned = call.source is not None and _aligned(call.source, call)
            self.nodes.append(call)
        self._stack.append((module, call))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = None
        while self._stack:  # a forward that raised and was caught left its entry behind
            entered, call = self._stack.pop()
            if entered is module:
                break
        if call is None or not isinstance(output, Tensor):
            return
        call.output = Geometry.of(output)
        key = _key(output)
        self._results[key] = call
        if key in self._made:  # a layer that hands its input on made nothing
            call.link([self._made[key]])
        self._made[key] = call

    def _inside(self) -> GraphNode | None:
        """The call of a layer or normalization in which an operator runs."""
        return next((call for _, call in reversed(self._stack) if call is not None), None)

    # --- operators ---------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keys = [_key(t) for t in tensors_in((args, kwargs))]
        output = func(*args, **kwargs)
        self._note(func, keys, _written(func, args, kwargs), tensors_in(output))
        return output

    def _note(self, func: Any, keys: list[Key], written: list[Tensor], outputs: list[Tensor]) -> None:
        space, _, op = func._schema.name.partition("::")
        call = self._inside()
        reader = call.name if call is not None else op
        changed = {_key(tensor) for tensor in written}
        views = {_key(tensor) for tensor in outputs} - changed  # what reads a view of it is its reader
        for read in {self._results[key] for key in keys if key in self._results and key not in views}:
            read.readers.append(reader)
        for key in self._readers_of.keys() & keys:
            self._readers_of[key].add(reader)
        effect = self._effect(space, op, keys)
        if effect is Effect.NORM and not any(is_norm(module) for module, _ in self._stack):
            name = self._names[self._stack[-1][0]] if self._stack else ""
            if name not in self.functional_norms:
                self.functional_norms.append(name)
        node = call if call is not None else GraphNode(op, effect)
        node.link(list(dict.fromkeys(self._made[key] for key in keys if key in self._made)))
        if node is not call and node.inputs:
            self.nodes.append(node)
        live = any(key in self._from_input for key in keys)
        for key in changed:
            self._results.pop(key, None)
        for tensor in (*outputs, *written):
            key = _key(tensor)
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

    def finish(self, output: Any) -> None:
        """Note which results are, or reach, what the model returned, and who else used a layer's parameters."""
        for call in self.nodes:
            for parameter in call.module.parameters(False) if call.module and is_layer(call.module) else ():
                call.parameters_shared |= bool(self._readers_of[_key(parameter)] - {call.name})
        for tensor in tensors_in(output):
            key = _key(tensor)
            if key in self._made:
                self._made[key].reaches_output = True
            if key in self._results:
                self._results[key].is_output = True
                self._results[key].readers.append("the model's output")


def _aligned(source: GraphNode, call: GraphNode) -> bool:
    assert source.module is not None
    assert call.module is not None
    assert source.output is not None
    assert call.input is not None
    axis = channel_axis(source.module, len(source.output.shape))
    after = channel_axis(call.module, len(call.input.shape))
    return axis is not None and after is not None and source.output.same_axis(axis, call.input, after)


def _matrices(op: str, keys: list[Key]) -> list[Key]:
    """The operands that are multiplied: without the bias, and of a convolution the weight alone."""
    if "convolution" in op:
        return keys[1:2]
    return keys[1:3] if op in ("addmm", "addmv", "baddbmm", "addbmm") else keys


def tensors_in(tree: Any, depth: int = 3) -> list[Tensor]:
    """The tensors in any nest of tuples, lists, mappings and objects that hold them as attributes."""
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping) and depth:
            found += tensors_in(list(leaf.values()), depth - 1)
        elif hasattr(leaf, "__dict__") and depth and not isinstance(leaf, (nn.Module, type)):
            found += tensors_in(list(vars(leaf).values()), depth - 1)
    return found


def _key(tensor: Tensor) -> Key:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, lazy and other tensors without a storage
        return id(tensor)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that the operator writes into, by its schema."""
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += tensors_in(value)
    return written
