"""Strategies for one module that takes a value of a given shape: a `Made` and the shape of its result."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from hypothesis import strategies as st

from .program import Made

__all__ = ["FUNCTIONS", "Scope", "draw_layer", "draw_norm", "draw_unary"]

Shape = tuple[int, ...]
_ACTIVATIONS = [
    ("nn.ReLU", (), ()), ("nn.ReLU6", (), ()), ("nn.LeakyReLU", (0.2,), ()), ("nn.SiLU", (), ()),
    ("nn.Hardswish", (), ()), ("nn.Sigmoid", (), ()), ("nn.Tanh", (), ()), ("nn.Identity", (), ()),
    ("nn.ReLU", (), (("inplace", True),)), ("nn.SiLU", (), (("inplace", True),)),
    ("nn.LeakyReLU", (0.2,), (("inplace", True),)), ("nn.GELU", (), ()), ("nn.ELU", (), ()), ("nn.Softplus", (), ()),
    ("nn.PReLU", (), ()), ("nn.Hardtanh", (), ()), ("nn.Hardtanh", (0.0, 6.0), ()), ("nn.Softmax", (1,), ()),
    ("nn.Mish", (), ()), ("nn.Hardsigmoid", (), ()), ("nn.Threshold", (0.0, 0.0), ()),
]  # fmt: skip
# Functions of one value that keep its shape.
FUNCTIONS = (
    "F.relu({0})", "torch.relu({0})", "{0}.relu()", "F.relu({0}, inplace=True)", "{0}.relu_()", "F.relu6({0})",
    "F.silu({0})", "F.leaky_relu({0}, 0.2)", "F.hardswish({0})", "torch.sigmoid({0})", "{0}.tanh()", "F.gelu({0})",
    "{0}.clamp(min=0)", "{0}.clamp(0, 6)", "{0} * torch.sigmoid({0})", "{0} * F.relu6({0} + 3) / 6",
    "F.leaky_relu_({0}, 0.1)", "{0} * 2", "-{0}", "{0} + 0.5", "{0}.mul_(0.5)", "{0}.abs()", "{0}.detach()",
    "{0}.contiguous()", "{0}.clone()", "F.softmax({0}, 1)", "F.threshold({0}, 0.0, 0.0)",
    "({0} if {0}.mean() > 0 else {0} * 2)", "F.dropout({0}, 0.3, self.training)",
    "torch.where({0} > 0, {0}, 0.1 * {0})",
)  # fmt: skip


@dataclass(frozen=True)
class Scope:
    """What a target's programs may hold."""

    training: bool = True  # some programs train
    ours: bool = True  # our layers and their options stand beside torch's
    dropout: bool = True
    touches: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float64", "float64", "float32")
    functions: tuple[str, ...] = FUNCTIONS
    needs_norm: bool = True
    elsewhere: bool = True  # a module's tensors are also read by something else
    touch_norms: bool = True
    longest: int = 6


def draw_layer(draw: Any, shape: Shape) -> tuple[Made, Shape]:
    """A convolution along the value's spatial axes, or a Linear along its last axis."""
    dims = len(shape) - 2
    if dims < 1 or draw(st.integers(0, 4)) == 0:
        return _linear(draw, shape)
    return draw(st.sampled_from([_conv, _conv, _conv_transpose]))(draw, shape)


def _linear(draw: Any, shape: Shape) -> tuple[Made, Shape]:
    out = draw(st.integers(1, 5))
    return Made("nn.Linear", (shape[-1], out), _bias(draw)), (*shape[:-1], out)


def _bias(draw: Any) -> tuple[tuple[str, Any], ...]:
    return () if draw(st.integers(0, 2)) else (("bias", False),)


def _groups(draw: Any, channels: int) -> tuple[int, int]:
    groups = draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    return groups, groups * draw(st.integers(1, 4 if groups == 1 else 2))


def _conv(draw: Any, shape: Shape) -> tuple[Made, Shape]:
    sizes = shape[2:]
    groups, out = _groups(draw, shape[1])
    kernel = tuple(draw(st.integers(1, min(3, size))) for size in sizes)
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    if any(dilation * (k - 1) + 1 > size for k, size in zip(kernel, sizes, strict=True)):
        dilation = 1
    padding: Any = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    if any(p >= size for p, size in zip(padding, sizes, strict=True)):
        mode = "zeros"
    after = tuple(
        (size + 2 * p - dilation * (k - 1) - 1) // stride + 1 for size, p, k in zip(sizes, padding, kernel, strict=True)
    )
    if stride == 1 and draw(st.integers(0, 7)) == 7:
        padding, after, mode = "same", sizes, "zeros"
    keywords = [("stride", stride), ("padding", repr(padding)), ("dilation", dilation), ("groups", groups)]
    usual = {"stride": 1, "padding": repr((0,) * len(sizes)), "dilation": 1, "groups": 1}
    changed = [(name, value) for name, value in keywords if value != usual[name]]
    changed += [("padding_mode", repr(mode))] if mode != "zeros" else []
    return Made(f"nn.Conv{len(sizes)}d", (shape[1], out, kernel), (*changed, *_bias(draw))), (shape[0], out, *after)


def _conv_transpose(draw: Any, shape: Shape) -> tuple[Made, Shape]:
    sizes = shape[2:]
    groups, out = _groups(draw, shape[1])
    kernel = draw(st.integers(1, 3))
    stride = draw(st.integers(1, 2)) if max(sizes) < 6 else 1
    padding = draw(st.integers(0, 1)) if (min(sizes) - 1) * stride + kernel - 2 >= 1 else 0
    extra = draw(st.integers(0, stride - 1))
    after = tuple((size - 1) * stride - 2 * padding + kernel + extra for size in sizes)
    named = {"stride": (stride, 1), "padding": (padding, 0), "output_padding": (extra, 0), "groups": (groups, 1)}
    changed = [(name, value) for name, (value, usual) in named.items() if value != usual]
    kind = f"nn.ConvTranspose{len(sizes)}d"
    return Made(kind, (shape[1], out, kernel), (*changed, *_bias(draw))), (shape[0], out, *after)


def draw_norm(draw: Any, shape: Shape, scope: Scope, training: bool) -> Made:
    dims = max(1, len(shape) - 2)
    keywords: list[tuple[str, Any]] = []
    eps = draw(st.sampled_from([1e-5, 1e-3, 0.1]))
    keywords += [("eps", eps)] if eps != 1e-5 else []
    momentum = draw(st.sampled_from([0.1, 0.1, None, 1.0, 0.5]))
    keywords += [("momentum", momentum)] if momentum != 0.1 else []
    keywords += [("affine", False)] if draw(st.integers(0, 5)) == 5 else []
    keywords += [("track_running_stats", False)] if draw(st.integers(0, 9)) == 9 else []
    family = draw(st.sampled_from(["nn", "nn", "ours", "act", "sync"] if scope.ours else ["nn", "nn", "nn", "sync"]))
    if family == "sync" and not training:
        return Made("nn.SyncBatchNorm", (shape[1],), tuple(keywords))
    if family in ("nn", "sync"):
        return Made(f"nn.BatchNorm{dims}d", (shape[1],), tuple(keywords))
    tracked = ("track_running_stats", False) not in keywords
    keywords += _options(draw, tracked)
    if family == "act":
        words = [None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh"]
        keywords.insert(0, ("activation", repr(draw(st.sampled_from(words)))))
        return Made(f"batchnorm.BatchNormAct{dims}d", (shape[1],), tuple(keywords))
    return Made(f"batchnorm.BatchNorm{dims}d", (shape[1],), tuple(keywords))


def _options(draw: Any, tracked: bool) -> list[tuple[str, Any]]:
    options = [(), ("ghost_batch_size", 2), ("ghost_batch_size", 3), ("nonfinite", "'skip'")]
    options += [("renorm", "batchnorm.Renorm(2.0, 1.0)"), ("accumulation_steps", 2)] if tracked else []
    chosen = draw(st.sampled_from([(), (), *options]))
    return [chosen] if chosen else []


def draw_unary(draw: Any, shape: Shape, scope: Scope, training: bool) -> tuple[Made, Shape]:
    """Any module of one input: a layer, a normalization, an activation, a pooling, a dropout."""
    sort = draw(st.sampled_from(["norm", "layer", "activation", "activation", "pool", "dropout"]))
    if sort == "norm" and prod(shape) // shape[1] > 1:
        return draw_norm(draw, shape, scope, training), shape
    if sort == "layer":
        return draw_layer(draw, shape)
    dims = len(shape) - 2
    if sort == "pool" and dims:
        return _pool(draw, shape)
    if sort == "dropout" and scope.dropout and dims in (0, 2, 3):
        return Made(f"nn.Dropout{dims or ''}{'d' if dims else ''}", (0.3,)), shape
    return Made(*draw(st.sampled_from(_ACTIVATIONS))), shape


def _pool(draw: Any, shape: Shape) -> tuple[Made, Shape]:
    dims = len(shape) - 2
    kind = draw(st.sampled_from(["AvgPool", "MaxPool", "AdaptiveAvgPool"]))
    if kind == "AdaptiveAvgPool":
        return Made(f"nn.{kind}{dims}d", (1,)), (*shape[:2], *(1,) * dims)
    if min(shape[2:]) < 2:
        return Made("nn.Identity"), shape
    return Made(f"nn.{kind}{dims}d", (2,)), (*shape[:2], *(size // 2 for size in shape[2:]))
