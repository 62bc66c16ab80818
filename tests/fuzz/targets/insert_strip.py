"""`insert` against normalizing by hooks, `strip` against taking out by hand, and both against nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.inspect.modules import is_norm, spatial_dims
from batchnorm.model_tools.insert import Normalized

from ..compare import Discard, Make, Snapshot, agree, quiet, reference, tool, train
from ..layers import Scope
from ..program import Case
from ..strategies import programs

__all__ = ["CASES", "check"]

_TOUCHES = (
    "eval",
    "train",
    "looking hook",
    "hook",
    "pre-hook",
    "wrapped",
    "parametrized",
    "no grad",
    "alias",
    "in a list",
)
SCOPE = Scope(touches=_TOUCHES, needs_norm=False, touch_norms=False)
_WAYS = st.sampled_from(["insert", "strip", "both"])
CASES = st.builds(lambda program, way: Case("insert_strip", program, None, (("way", way),)), programs(SCOPE), _WAYS)


def check(make: Make, *, way: str) -> None:
    {"insert": _check_insert, "strip": _check_strip, "both": _check_both}[way](make)


def _check_both(make: Make) -> None:
    reference(make, _answers)
    model, x = make()
    if any(is_norm(module) for module in model.modules()):
        raise Discard("strip would take its own ones out too")
    before = Snapshot(model)
    with tool(model):
        batchnorm.insert(model, x)
    with tool(model):
        batchnorm.strip(model, x)
    before.check(model, "insert and strip")


def _check_insert(make: Make) -> None:
    reference(make, _answers)
    model, x = make()
    with tool(model):
        inserted = batchnorm.insert(model, x, eps=1e-3)
    names = [name for name, module in inserted.named_modules() if isinstance(module, Normalized)]

    def run(net: nn.Module, x: Tensor) -> Any:
        if net is not inserted:
            for name in names:
                layer: Any = net.get_submodule(name)
                layer.register_forward_hook(_normalize)
                if layer.bias is not None:  # the normalization takes its place
                    layer.bias.data.zero_()
        return _answers(net, x)

    want = reference(make, run)
    with quiet():
        found = run(inserted, x)
    agree(found, make, run, want, x.dtype)


def _normalize(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    axis = out.dim() - 1 - spatial_dims(layer)
    rows = out if axis == 1 else out.reshape(-1, out.shape[-1])
    mean, var = rows.new_zeros(rows.shape[1]), rows.new_ones(rows.shape[1])
    return F.batch_norm(rows, mean, var, training=layer.training, eps=1e-3).reshape(out.shape)


def _check_strip(make: Make) -> None:
    reference(make, _answers)
    model, x = make()
    with tool(model):
        stripped = batchnorm.strip(model, x)
    biases = {name: parameter for name, parameter in stripped.named_parameters() if name.endswith("bias")}

    def run(net: nn.Module, x: Tensor) -> Any:
        if net is not stripped:
            for module in [module for module in net.modules() if is_norm(module)]:
                module.forward = lambda input, *rest, **more: input
            own = dict(net.named_parameters())
            for name, bias in biases.items():
                if name not in own:
                    path, _, last = name.rpartition(".")
                    net.get_submodule(path).register_parameter(last, nn.Parameter(bias.detach().double().clone()))
        return _answers(net, x)

    want = reference(make, run)
    with quiet():
        found = run(stripped, x)
    agree(found, make, run, want, x.dtype)


def _answers(model: nn.Module, x: Tensor) -> dict[str, Any]:
    wanted = ("output", "stored", "gradient input")
    return {n: t for n, t in train(model, x, 1, update=False).items() if n[2:].startswith(wanted)}
