"""What a model computes, and whether two models compute the same: measured against float64, and against how much the
reference itself moves when its numbers are rounded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.errors import UserError

from . import parts

__all__ = [
    "Discard",
    "Mismatch",
    "Refused",
    "Snapshot",
    "agree",
    "exact_batch_norm",
    "kept_by",
    "quiet",
    "reference",
    "tool",
    "torchs_refusals",
    "train",
]

Make = Callable[[], tuple[nn.Module, Tensor]]
Trace = dict[str, Tensor]
# Relative to the largest value of the same sort: several layers' rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 8e-2}
_ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 4e-3}


class Discard(Exception):
    """The program itself does not run, or its answers are no numbers."""


class Mismatch(AssertionError):
    """A tool's model computes something else, or a tool left something changed."""


class Refused(Exception):
    """The tool said in one line that it does not do this."""


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings that random programs bring about are not what is looked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def tool(*models: nn.Module, errors: tuple[type[Exception], ...] = (UserError,)) -> Iterator[None]:
    """Run a tool: an honest refusal has to leave the models as they were; the generator stays where it is anyway."""
    before = [Snapshot(model) for model in models]
    state = torch.get_rng_state()
    try:
        with quiet():
            yield
    except errors as error:
        if "\n" in str(error).strip() or not str(error).strip():
            raise Mismatch(f"a refusal is one line, and this one is {error!r}") from error
        for model, snapshot in zip(models, before, strict=True):
            snapshot.check(model, "a refusal")
        raise Refused(str(error)) from error
    if not torch.equal(state, torch.get_rng_state()):
        raise Mismatch("the tool moved torch's random generator")


class Snapshot:
    """All of a model that a tool could change by mistake."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: _facts(module) for name, module in model.named_modules(remove_duplicate=False)}
        self.tensors = {name: (t, t.detach().clone()) for name, t in _tensors(model)}
        self.flags = {name: (t.requires_grad, t.grad) for name, t in _tensors(model)}

    def check(self, model: nn.Module, after: str) -> None:
        now = {name: _facts(module) for name, module in model.named_modules(remove_duplicate=False)}
        if list(now) != list(self.modules):
            raise Mismatch(f"after {after} the modules are {list(now)}, and were {list(self.modules)}")
        for name, facts in now.items():
            for what, value in facts.items():
                if what == "mode" and "parametrizations" in name:  # a new one trains until its layer is told a mode
                    continue
                if value != self.modules[name][what]:
                    raise Mismatch(f"after {after} {what} of {name!r} is {value}, and was {self.modules[name][what]}")
        tensors = dict(_tensors(model))
        if list(tensors) != list(self.tensors):
            raise Mismatch(f"after {after} the tensors are {list(tensors)}, and were {list(self.tensors)}")
        for name, tensor in tensors.items():
            old, value = self.tensors[name]
            if tensor is not old or not torch.equal(tensor.nan_to_num(), value.nan_to_num()):
                raise Mismatch(f"after {after} the tensor {name!r} is another")
            required, grad = self.flags[name]
            if tensor.requires_grad != required or tensor.grad is not grad:
                raise Mismatch(f"after {after} requires_grad or grad of {name!r} is another")


def _facts(module: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "id": id(module),
        "class": type(module),
        "mode": module.training,
        "hooks": [tuple(module.__dict__[name].values()) for name in hooks],
        "attributes": sorted(
            name
            for name, value in module.__dict__.items()
            if not name.startswith("kept") and not (name == "frozen" and value is False)  # the class says so too
        ),
    }


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def kept_by(model: nn.Module) -> Trace:
    """The values that a forward stored as attributes."""
    found = {}
    for name, value in getattr(model, "_orig_mod", model).__dict__.items():  # torch.compile's wrapper has none
        if name.startswith("kept") and isinstance(value, Tensor):
            found[f"stored {name}"] = value.detach().clone()
    return found


def train(
    model: nn.Module, x: Tensor, steps: int = 2, *, backward: bool = True, update: bool = True, first: int = 0
) -> Trace:
    """Outputs, gradients for random grad_outputs, running statistics and stored values of a few steps."""
    trace: Trace = {}
    generator = torch.Generator().manual_seed(first)
    torch.manual_seed(first)  # dropout
    for step in range(first, first + steps):
        leaf = parts.scaled(x, (1.0, -0.7, 1.6)[step % 3]).requires_grad_(backward and step % 2 == 0)
        outs = [t for t in tree_leaves(model(leaf)) if isinstance(t, Tensor)]
        trace |= {f"{step} output {i}": out.detach().clone() for i, out in enumerate(outs)}
        trace |= {f"{step} {name}": value for name, value in kept_by(model).items()}
        if backward:
            trace |= {f"{step} {name}": grad for name, grad in _backward(model, leaf, outs, generator, update).items()}
        trace |= {f"{step} buffer {name}": buffer.detach().clone() for name, buffer in model.named_buffers()}
    return trace


def _backward(model: nn.Module, leaf: Tensor, outs: list[Tensor], generator: torch.Generator, update: bool) -> Trace:
    wanted = {f"gradient {n}": p for n, p in model.named_parameters() if p.requires_grad}
    if leaf.requires_grad:
        wanted["gradient input"] = leaf
    pairs = [(out, torch.randn(out.shape, generator=generator).to(out.dtype)) for out in outs]
    pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
    if not pairs or not wanted:
        return {}
    results, given = zip(*pairs, strict=True)
    grads = torch.autograd.grad(results, list(wanted.values()), given, allow_unused=True)
    found: Trace = {}
    with torch.no_grad():
        for (name, tensor), grad in zip(wanted.items(), grads, strict=True):
            found[name] = torch.zeros_like(tensor) if grad is None else grad.detach().clone()
            if update and tensor is not leaf and grad is not None:
                tensor -= 0.02 * grad  # the next step shows whether an optimizer still reaches the parameters
    return found


def exact_batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`F.batch_norm` by its definition, for the reference: torch's own backward on the CPU reads a grad_output of shape
    (2, 2, 3, 1) and strides (6, 1, 2, 1) in the wrong order."""
    axes, shape = [0, *range(2, input.dim())], (1, -1, *(1,) * (input.dim() - 2))
    if training:
        count = input.numel() // input.shape[1]
        if count < 2:
            raise ValueError("Expected more than 1 value per channel when training")
        mean, var = input.mean(axes), input.var(axes, unbiased=False)
        if running_mean is not None:
            with torch.no_grad():
                running_mean.mul_(1 - momentum).add_(momentum * mean)
                running_var.mul_(1 - momentum).add_(momentum * var * count / (count - 1))
    else:
        mean, var = running_mean.clone(), running_var.clone()  # they may move before the backward
    hat = (input - mean.view(shape)) * (var.view(shape) + eps).rsqrt()
    hat = hat if weight is None else hat * weight.view(shape)
    return hat if bias is None else hat + bias.view(shape)


def reference(make: Make, run: Callable[[nn.Module, Tensor], Trace], noise: float = 0.0, seed: int = 0) -> Trace:
    """The untouched model in float64, its numbers rounded at random by `noise`."""
    try:
        with quiet():
            model, x = make()
            model, x = model.double(), x.double()
            if noise:
                generator = torch.Generator().manual_seed(seed)
                x = x * (1 + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype))
                with torch.no_grad():
                    for tensor in [*model.parameters(), *model.buffers()]:
                        if tensor.is_floating_point() and tensor.numel():
                            other = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                            tensor.copy_(tensor * (1 + noise * other))
            with mock.patch.object(nn.functional, "batch_norm", exact_batch_norm):
                trace = run(model, x)
    except (Mismatch, Refused):
        raise
    except Exception as error:
        raise Discard(f"{type(error).__name__}: {error}") from error
    if not all(t.isfinite().all() for t in trace.values() if t.is_floating_point()):
        raise Discard("the reference is not finite")
    return trace


def agree(found: Trace, make: Make, run: Callable[[nn.Module, Tensor], Trace], want: Trace, dtype: torch.dtype) -> None:
    """Raise `Mismatch` where `found` is not `want` by more than rounding can explain.

    Rounding is what the reference does when its own numbers are rounded: a ReLU at zero, a maximum of equals and a
    variance of nearly nothing make it large, and such a case shows nothing.
    """
    if set(found) != set(want):
        raise Mismatch(f"results differ: {sorted(set(found) ^ set(want))}")
    wrong = [name for name in want if _error(found[name], want[name], _scale(want, name)) > _TOLERANCE[dtype]]
    if not wrong:
        return
    moved = [reference(make, run, _ROUNDING[dtype] * factor, seed) for seed, factor in enumerate((8, 8, 8, 30, 30))]
    moved.append(_native(make, run))  # which has torch's own faults
    for name in wrong:
        scale = _scale(want, name)
        error = _error(found[name], want[name], scale)
        rounding = max(_error(other[name], want[name], scale) for other in moved)
        if error > 30 * rounding + _TOLERANCE[dtype]:
            raise Mismatch(f"{name} is off by {error:.2g} of the largest value")


def _native(make: Make, run: Callable[[nn.Module, Tensor], Trace]) -> Trace:
    """The untouched model in its own dtype."""
    with quiet():
        return run(*make())


@contextmanager
def torchs_refusals(make: Make, run: Callable[[nn.Module, Tensor], Trace], *, always: bool = False) -> Iterator[None]:
    """Discard the case where a saved tensor was written to: so refuse torch's own layers, and not the definition.
    `always`: the untouched model need not show it."""
    try:
        yield
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        if always:
            raise Discard("torch's layers refuse it") from error
        try:
            with quiet():
                _native(make, run)
        except RuntimeError:
            raise Discard("torch's layers refuse it too") from error
        raise


def _scale(want: Trace, name: str) -> float:
    """The largest value of the same sort in the same step: gradients that cancel are measured by those that do not."""
    sort = " ".join(name.split()[:2])
    same = [t for other, t in want.items() if other.startswith(sort) and t.is_floating_point()]
    # grad_output is of size 1: a gradient of two values a channel is nothing but rounding
    return max([1e-3, *(t.abs().max().item() for t in same if t.numel())])


def _error(found: Tensor, want: Tensor, scale: float) -> float:
    if found.shape != want.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    difference = (found.double() - want.double()).abs().max().item()
    return difference / scale if difference == difference else float("inf")
