"""Watches a few training steps: which forward moved which statistics, and between which optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _hooks
from torch.optim import Optimizer
from torch.optim import optimizer as _optimizers
from torch.overrides import TorchFunctionMode

from ...errors import UserError, quote_error
from ...functional import batch_norm
from ...inspect.modules import names_of_tensors
from ...inspect.nests import tensors_in
from ...inspect.untouched import Preserved, preserved
from .input_batches import Batch, copied
from .normalizations import Layer, find_layers
from .second_models import models_of

__all__ = ["Training", "Updates", "in_backward", "watch_steps"]

_STEPS = 4


def in_backward() -> bool:
    """Return whether a backward runs. A forward that runs inside it is one that checkpointing recomputes."""
    return int(torch._C._current_graph_task_id()) != -1


@dataclass
class Updates:
    """How one layer's running statistics moved during the watched steps."""

    name: str
    in_forward: int = 0  # with gradients enabled
    without_gradient: int = 0
    recomputed: int = 0
    unused: int = 0  # in forwards that no gradient was taken of
    repeated: int = 0  # calls in a backward, whether they moved anything or not
    # pairs (state of the parameters, number of backward passes before it)
    passes: set[tuple[int, int]] = field(default_factory=set)

    @property
    def passes_a_step(self) -> float:
        """Number of forward-backward passes for each state of the parameters: 1 without accumulation."""
        return len(self.passes) / max(1, len({state for state, _ in self.passes}))


@dataclass
class Training:
    """What the steps showed. `updates` is by the id of the layer, or of the running mean for functional calls."""

    updates: dict[int, Updates] = field(default_factory=dict)
    optimizers: int = 0
    backwards: int = 0
    forwards: int = 0
    steps: int = 0


def watch_steps(
    model: nn.Module,
    layers: list[Layer],
    batches: list[Batch],
    step: Callable[[Any], Any],
    optimizer: Optimizer | None,
) -> Training:
    """Run ``step(batch)`` a few times, and restore the model, the gradients and every optimizer that stepped.

    Raises:
        UserError: the step raises.
    """
    batches = [batch for batch in batches if batch.size > 1] or batches  # a last sample alone raises, and has its rule
    budget = max(2, min(_STEPS, 2 * len(batches)))
    with preserved(model, [optimizer] if optimizer is not None else [], gradients=True) as kept:
        watch = _Watch(model, layers, kept, models_of(step))
        with watch.attached():
            for number in range(budget):
                batch = batches[number % len(batches)]
                try:
                    with watch:
                        step(copied(batch.raw))
                except Exception as error:
                    raise UserError(
                        f"the training step raises ({quote_error(error)}), batch {number % len(batches)} of shape "
                        f"{batch.shapes()}, pass a step that takes one batch as it stands in batches"
                    ) from error
                watch.result.steps += 1
    watch.finish()
    return watch.result


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module, layers: list[Layer], kept: Preserved, others: dict[str, nn.Module]) -> None:
        super().__init__()
        self.result = Training()
        self._model, self._kept = model, kept
        self._layers = {id(layer.module): layer for layer in layers if layer.module is not None}
        self._known = {id(module) for module in model.modules()}
        self._names = names_of_tensors(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._before: dict[int, Tensor] = {}
        self._functional_means: dict[int, Tensor] = {}
        self._inside = 0
        self._optimizers: set[int] = set()
        self._state = 0
        self._fingerprint: list[float] = []
        self._anchor: int | None = None  # the first key that updates; its updates look at the parameters
        self._depth = 0
        self._undecided: list[Updates] = []  # of the outermost call now, whose result decides
        self._waiting: list[tuple[Updates, list[bool]]] = []  # whether a gradient reached the result
        for name, other in others.items():
            self._adopt(other, name)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach hooks to all modules and optimizers."""
        before = _hooks.register_module_forward_pre_hook(self._enter)
        after = _hooks.register_module_forward_hook(self._leave, always_call=True)
        with before, after, _optimizers.register_optimizer_step_pre_hook(self._before_step):
            yield

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._kept.add_optimizer(optimizer)
        self._optimizers.add(id(optimizer))
        self.result.optimizers = len(self._optimizers)

    def _adopt(self, module: nn.Module, name: str) -> None:
        """Watch and keep a module that is no part of the model: a teacher, a generator, a wrapper around the model."""
        if id(module) in self._known:
            return
        self._kept.add_model(module, gradients=True)
        self._known |= {id(part) for part in module.modules()}
        for layer in find_layers(module):
            layer.name = ".".join(filter(None, (name, layer.name)))
            self._layers.setdefault(id(layer.module), layer)
        for key, tensor in names_of_tensors(module).items():
            self._names.setdefault(key, f"{name}.{tensor}")

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        self._adopt(module, type(module).__name__)
        if module is self._model and not in_backward():
            self.result.forwards += 1
        layer = self._layers.get(id(module))
        if layer is not None:
            self._inside += 1
            if isinstance(module.running_mean, Tensor):
                self._before[id(module)] = module.running_mean.detach().clone()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        layer = self._layers.get(id(module))
        if layer is not None:
            self._inside -= 1
            before = self._before.pop(id(module), None)
            after = module.running_mean
            if before is not None and isinstance(after, Tensor) and not torch.equal(before, after):
                self._note(id(layer), layer.name, output)
            if in_backward() and id(layer) in self.result.updates:
                self.result.updates[id(layer)].repeated += 1
        self._depth -= 1
        if not self._depth:
            self._decide(output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(func, args, kwargs)
        if func in (F.batch_norm, batch_norm) and not self._inside:
            return self._functional(func, args, kwargs)
        return func(*args, **kwargs)

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a backward. A mode does not see what autograd calls, so only a moved buffer shows a recomputed call."""
        before = {key: mean.detach().clone() for key, mean in self._functional_means.items()}
        try:
            return func(*args, **kwargs)
        finally:
            self.result.backwards += 1
            for key, value in before.items():
                if not torch.equal(value, self._functional_means[key]):
                    self.result.updates[key].recomputed += 1

    def _functional(self, func: Any, args: Any, kwargs: Any) -> Any:
        mean = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
        before = None if mean is None else mean.detach().clone()
        output = func(*args, **kwargs)
        if before is not None and not torch.equal(before, mean):
            self._functional_means[id(mean)] = mean
            self._note(id(mean), self._names.get(id(mean), "batch_norm"), output)
            if not self._depth:
                self._decide(None)
        return output

    def _note(self, key: int, name: str, output: Any) -> None:
        updates = self.result.updates.setdefault(key, Updates(name))
        if in_backward():
            updates.recomputed += 1
        elif not torch.is_grad_enabled():
            updates.without_gradient += 1
            updates.unused += 1
        else:
            self._wait_for_gradient(updates, output)
            updates.in_forward += 1
            self._anchor = key if self._anchor is None else self._anchor
            if key == self._anchor:
                self._look_at_parameters()
            updates.passes.add((self._state, self.result.backwards))

    def _wait_for_gradient(self, updates: Updates, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad:
            self._undecided.append(updates)  # its input is data and nothing in it learns, or nothing behind it does
            return
        reached: list[bool] = []
        output.register_hook(lambda gradient: reached.append(True))
        self._waiting.append((updates, reached))

    def _decide(self, output: Any) -> None:
        """The outermost call ends. Where its result has no gradient, none is taken of what it called."""
        if not any(tensor.requires_grad for tensor in tensors_in(output)):
            for updates in self._undecided:
                updates.unused += 1
        self._undecided.clear()

    def finish(self) -> None:
        """Count the forwards that no gradient was taken of: none came, though there were backwards, or it was detached.

        A forward that a backward repeats has its gradient from the repetition.
        """
        if any(reached for _, reached in self._waiting):
            for updates in (updates for updates, reached in self._waiting if not reached):
                updates.unused += 1
        for updates in self.result.updates.values():
            updates.unused = max(0, updates.unused - max(updates.repeated, updates.recomputed))

    def _look_at_parameters(self) -> None:
        """Count a new state of the parameters by their values. Version counters miss an update through `.data`."""
        now = [float(p.detach().double().abs().sum()) for p in self._parameters]
        if now != self._fingerprint:
            self._state += 1
            self._fingerprint = now
