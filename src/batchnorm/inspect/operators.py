"""One table of operators: what each does to the value that it reads. Names have no namespace and no overload."""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

import torch
from torch import fx

__all__ = ["SHAPED_LIKE", "Effect", "effect_of", "keeps_place", "node_operator", "operator_name"]


class Effect(Enum):
    LAYER = "layer"  # multiplies by a weight
    NORM = "normalization"  # a batch normalization
    DROPOUT = "dropout"
    CARRY = "carry"  # every element as it is: what is a channel before is one after, on some axis
    CONVERT = "convert"  # every element as it is, where dtype and device stay
    MIX = "mix"  # linear or a selection: a normalization after it still comes before the activation
    CHECK = "check"  # reads no element
    OTHER = "other"


_TABLE: dict[Effect, str] = {
    Effect.LAYER: """
        convolution _convolution convolution_overrideable mkldnn_convolution linear mm addmm bmm baddbmm addbmm mv addmv
        lstm gru rnn_tanh rnn_relu mkldnn_rnn_layer _cudnn_rnn _native_multi_head_attention
        _transformer_encoder_layer_fwd conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""",
    Effect.NORM: """
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        _native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_no_update _batch_norm_impl_index
        batch_norm cudnn_batch_norm miopen_batch_norm batch_norm_elemt""",
    Effect.DROPOUT: """
        dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout native_dropout""",
    Effect.CARRY: """
        view _unsafe_view view_as reshape reshape_as _reshape_alias flatten unflatten permute transpose t movedim
        swapaxes squeeze unsqueeze contiguous clone alias slice select expand expand_as""",
    Effect.CONVERT: "to type_as detach lift_fresh",
    Effect.MIX: """
        add add_ sub sub_ cat stack copy_ _to_copy constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
        _adaptive_avg_pool3d mean sum index index_select gather upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_bilinear2d pixel_shuffle native_channel_shuffle channel_shuffle roll flip repeat neg
        max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d adaptive_max_pool2d adaptive_max_pool3d
        as_strided split split_with_sizes unbind unfold""",
    Effect.CHECK: "_assert_tensor_metadata sym_size sym_stride sym_numel sym_storage_offset",
}
_EFFECTS = {name: effect for effect, names in _TABLE.items() for name in names.split()}
_LINEAR = {Effect.CARRY, Effect.CONVERT, Effect.MIX, Effect.DROPOUT}
# They read the shape of their second operand alone.
SHAPED_LIKE = frozenset({"view_as", "reshape_as", "expand_as"})


# Where torch's functions and its tensors' methods live. A function from elsewhere may bear the name of one of them.
_TORCH = ("torch", "torch.functional", "torch.nn.functional", "torch._C", "torch._C._nn", "torch._tensor")


def effect_of(name: str) -> Effect:
    """What the operator of this name does."""
    return _EFFECTS.get(name, Effect.OTHER)


def node_operator(node: fx.Node) -> str:
    """The name of the operator that the node runs; '' for an input, an attribute, a module's call and the output."""
    return operator_name(node.target) if node.op in ("call_function", "call_method") else ""


def operator_name(target: Any) -> str:
    """ATen's name for what a program calls: an operator, a function of torch or of Python, or a method by its name.

    `torch.relu_` and `x.relu_()` are "relu_", `x += y` is "add_" and `x / y` "div". A function that is not torch's
    keeps its module's name, so that it is never taken for an operator.
    """
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    name = str(getattr(target, "__name__", target))
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", "")
    if module == operator.add.__module__:
        return _python_operator(name.strip("_"))
    return name if module in _TORCH else f"{module}.{name}"


def _python_operator(name: str) -> str:
    in_place = name.startswith("i") and any(hasattr(operator, form) for form in (name[1:], f"{name[1:]}_"))
    stem = name[1:] if in_place else name
    return ("div" if stem == "truediv" else stem) + "_" * in_place


def keeps_place(effect: Effect) -> bool:
    """Whether a normalization after such an operator still comes before the activation of the layer before it."""
    return effect in _LINEAR
