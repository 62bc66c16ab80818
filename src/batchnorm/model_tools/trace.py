"""What running an example shows: the calls in order, and whose result each one works on.

The model runs once under a dispatch mode. Every tensor's storage carries marks: the layer calls whose
results it was computed from *without passing another layer*. A convolution or matrix product whose weight
does not come from the input is such a layer, also where the model calls it as a function. Storages, not tensors,
are marked: views, in-place operations and slices written one by one then need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .kinds import channel_axis, is_layer, is_norm
from .replace import names_of
from .untouched import run_example, untouched

__all__ = ["NORM_OPS", "Call", "Geometry", "Trace", "tensors_in", "trace"]

Key = StorageWeakRef | int

_LAYER_OPS = {
    "convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "linear", "mm", "addmm",
    "bmm", "baddbmm", "addbmm", "mv", "addmv", "lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer",
    "_cudnn_rnn", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
}  # fmt: skip
NORM_OPS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_no_update",
    "_batch_norm_impl_index", "batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_elemt",
}  # fmt: skip
# A batch normalization after any of these still comes before the layer's activation.
_PASSIVE_OPS = {
    "add", "add_", "sub", "sub_", "cat", "stack", "clone", "copy_", "_to_copy", "constant_pad_nd",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d", "mean", "sum", "index", "index_select", "gather", "native_dropout",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "pixel_shuffle",
    "native_channel_shuffle", "channel_shuffle", "roll", "flip", "repeat", "neg", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "mkldnn_max_pool2d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "_unsafe_view", "view", "reshape", "_reshape_alias", "as_strided", "transpose", "t", "permute", "squeeze",
    "unsqueeze", "expand", "slice", "select", "split", "split_with_sizes", "unbind", "alias", "detach", "unfold",
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def same_axis(self, axis: int, other: Geometry, other_axis: int) -> bool:
        """Whether two views of all of one storage have the same elements along these axes."""
        size, theirs = self.shape[axis], other.shape[other_axis]
        strides = size == 1 or self.stride[axis] == other.stride[other_axis]
        whole = prod(self.shape) == prod(other.shape) and self.offset == other.offset
        return size == theirs and strides and whole


@dataclass(eq=False)
class Call:
    """One call of a Conv, ConvTranspose, Linear or batch normalization module."""

    name: str
    module: nn.Module
    inputs: int  # how many tensors it was given
    input: Geometry | None
    output: Geometry | None = None
    source: Call | None = None  # the call whose result is the input, itself or a view of it, unchanged
    aligned: bool = False  # the channels of the source's result are those of the input
    readers: list[str] = field(default_factory=list)  # what reads the result: module names or operator names
    feeds_layer: bool = False
    meets_norm: bool = False  # a batch normalization comes before the next activation or layer
    reaches_output: bool = False
    is_output: bool = False  # the model returns this very result
    parameters_shared: bool = False  # something outside the layer reads its weight or bias


@dataclass(frozen=True)
class Trace:
    """`calls` in order; `functional_norms` names the modules that call `F.batch_norm` themselves."""

    calls: tuple[Call, ...]
    functional_norms: tuple[str, ...]
    output: Any = field(repr=False, default=None)

    def calls_of(self, module: nn.Module) -> list[Call]:
        return [call for call in self.calls if call.module is module]

    def output_layers(self) -> set[nn.Module]:
        """Layers whose result the model returns: as it is, or by a way without any layer. A layer that
        reaches the output only beside a skip connection, and feeds other layers too, is a hidden one."""
        return {
            call.module
            for call in self.calls
            if is_layer(call.module) and (call.is_output or (call.reaches_output and not call.feeds_layer))
        }

    def normalized_layers(self) -> list[nn.Module]:
        """Layers, in the order of their calls, whose result meets a batch normalization before an activation
        or another layer."""
        return list(dict.fromkeys(c.module for c in self.calls if is_layer(c.module) and c.meets_norm))


def trace(model: nn.Module, example: Any, what: str) -> Trace:
    """Runs the example once, in the model's own mode with normalizations and dropouts in eval, and leaves
    the model, its buffers and the random generators as they were.

    Raises:
        UserError: the model does not run on the example; `what` names the caller in the message.
    """
    recorder = _Recorder(model, example)
    with untouched(model):
        handles = recorder.hook()
        try:
            with recorder:
                output = run_example(model, example, what)
        finally:
            for handle in handles:
                handle.remove()
    recorder.finish(output)
    return Trace(tuple(recorder.calls), tuple(recorder.functional_norms), output)


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.functional_norms: list[str] = []
        self._names = names_of(model)
        self._stack: list[tuple[nn.Module, Call | None]] = []
        # Weak references keep the storages' addresses from being used again, but not their memory.
        self._marks: dict[Key, dict[Call, bool]] = {}  # the bool: only linear steps since
        self._own: dict[Key, Call] = {}
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
            first = Geometry.of(inputs[0]) if inputs else None
            call = Call(self._names[module], module, len(inputs), first)
            if inputs:
                call.source = self._own.get(_key(inputs[0]))
                call.aligned = call.source is not None and _aligned(call.source, call)
            self.calls.append(call)
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
        self._own[_key(output)] = call
        if is_layer(module):
            self._marks[_key(output)] = {call: True}

    def _reader(self, op: str) -> str:
        for module, call in reversed(self._stack):
            if call is not None:
                return self._names[module]
        return op

    # --- operators ---------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keys = [_key(t) for t in tensors_in((args, kwargs))]
        output = func(*args, **kwargs)
        self._note(func, keys, _written(func, args, kwargs), tensors_in(output))
        return output

    def _note(self, func: Any, keys: list[Key], written: list[Tensor], outputs: list[Tensor]) -> None:
        space, _, op = func._schema.name.partition("::")
        changed = {_key(tensor) for tensor in written}
        views = {_key(tensor) for tensor in outputs} - changed  # what reads a view of it is its reader
        for call in {self._own[key] for key in keys if key in self._own and key not in views}:
            call.readers.append(self._reader(op))
        for key in self._readers_of.keys() & keys:
            self._readers_of[key].add(self._reader(op))
        carried = self._carry(space, op, keys)
        live = any(key in self._from_input for key in keys)
        for key in changed:
            self._own.pop(key, None)
        for tensor in (*outputs, *written):
            key = _key(tensor)
            self._marks[key] = carried
            if live:
                self._from_input.add(key)

    def _carry(self, space: str, op: str, keys: list[Key]) -> dict[Call, bool]:
        """The marks that the operator's results bear."""
        carried: dict[Call, bool] = {}
        for key in keys:
            for call, linear in self._marks.get(key, {}).items():
                carried[call] = carried.get(call, False) or linear
        if op in _LAYER_OPS and any(key not in self._from_input for key in _matrices(op, keys)):
            for call in carried:
                call.feeds_layer = True
            return {}
        if op in NORM_OPS or space == "batchnorm":
            # torch writes an instance normalization as a batch normalization of a reshaped input.
            if not any(isinstance(module, _InstanceNorm) for module, _ in self._stack):
                self._note_norm(carried)
            return dict.fromkeys(carried, False)
        live = sum(key in self._from_input for key in keys)
        scales = op in ("mul", "mul_", "div", "div_") and live == 1  # by a constant or a parameter
        return carried if op in _PASSIVE_OPS or scales else dict.fromkeys(carried, False)

    def _note_norm(self, carried: dict[Call, bool]) -> None:
        for call, linear in carried.items():
            call.meets_norm = call.meets_norm or linear
        if not any(is_norm(module) for module, _ in self._stack):
            name = self._names[self._stack[-1][0]] if self._stack else ""
            if name not in self.functional_norms:
                self.functional_norms.append(name)

    def finish(self, output: Any) -> None:
        """Notes which results are, or reach, what the model returned, and who else used a layer's parameters."""
        for call in self.calls:
            for parameter in call.module.parameters(False) if is_layer(call.module) else ():
                call.parameters_shared |= bool(self._readers_of[_key(parameter)] - {call.name})
        for tensor in tensors_in(output):
            key = _key(tensor)
            for call in self._marks.get(key, {}):
                call.reaches_output = True
            if key in self._own:
                self._own[key].is_output = True
                self._own[key].readers.append("the model's output")


def _aligned(source: Call, call: Call) -> bool:
    assert source.output is not None
    assert call.input is not None
    axis, after = (channel_axis(c.module, len(g.shape)) for c, g in ((source, source.output), (call, call.input)))
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
