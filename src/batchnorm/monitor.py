"""`Monitor` measures, on some of the steps, what batch normalization does while a model trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as _optimizers

from .bench import StepMemory, StorageCount, process_peak
from .doctor.evidence.training_steps import in_backward
from .errors import UserError
from .inspect.modules import is_norm

__all__ = ["Monitor", "Row", "Writer"]

PERCENTILES = (0.15, 0.5, 0.85)
# Percentiles use about this many evenly spaced values of an output. Their standard error is then about 0.02 σ.
_SAMPLED_VALUES = 4096


class Writer(Protocol):
    """Where rows are written: torch.utils.tensorboard's SummaryWriter, or any object with this method."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


@dataclass(frozen=True)
class Row:
    """One layer on one sampled step.

    Attributes:
        step, layer: the model's training forward, counted from 1, and the layer's name.
        p15, p50, p85: percentiles of the layer's output, which is the input of the activation.
        drift: change of the running mean since the layer's last row, in √(running_var + ε); root mean square over
            channels.
        log2_drift: change of the running variance since the last row, in powers of two; root mean square.
        lag: distance of the batch's mean from the running mean, in √(running_var + ε); root mean square.
        values: values per channel in the batch.
        effective: the number of independent samples whose mean has the variance of the batch's mean. It is σ² over
            that variance, which is estimated from the samples' means. For images it lies between the number of
            samples and `values`.
        updates_a_step: updates of the statistics per optimizer step since the last row. NaN before the first step.
    """

    step: int
    layer: str
    p15: float
    p50: float
    p85: float
    drift: float
    log2_drift: float
    lag: float
    values: int
    effective: float
    updates_a_step: float


class Monitor:
    """Watch the batch normalization modules of a model while it trains.

        with Monitor(model, writer=SummaryWriter()) as monitor:
            train(model)
        print(monitor.table())
        print(monitor.memory)

    Every `every`-th training forward is measured. The other forwards only count their calls. Functional calls are not
    watched. `stop` removes all hooks.

    `memory` is what the last measured forward kept for its backward, with the process's peak until then; None for a
    compiled model. While a monitor watches, normalizations and activations run one after the other.

    Args:
        model: a module that contains batch normalization.
        every: measure one of this many training forwards, beginning with the first.
        writer: receives the numbers of each row as ``batchnorm/LAYER/NAME``. They are in `rows` too.

    Raises:
        UserError: the model has no batch normalization, or `every` is less than 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 50, writer: Writer | None = None) -> None:
        if every < 1:
            raise UserError(f"every is {every}, Monitor(every=…), give how many training forwards lie between samples")
        self.layers = {name: module for name, module in model.named_modules() if is_norm(module)}
        if not self.layers:
            raise UserError(f"no batch normalization in {type(model).__name__}, Monitor(model), nothing to watch")
        self.rows: list[Row] = []
        self.step = 0
        self.optimizer_steps = 0
        self._model, self._every, self._writer = model, every, writer
        self._names = {id(module): name for name, module in self.layers.items()}
        self._parameters = {id(p) for p in model.parameters()}
        self._calls: dict[str, Counter[str]] = {name: Counter() for name in self.layers}
        self._last: dict[str, tuple[Tensor, Tensor]] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self.memory: StepMemory | None = None
        self._count: StorageCount | None = None
        self._counted_step = 0
        self._sampling = False
        self._driven = False
        self._handles: list[Any] = []

    # --- start and stop ----------------------------------------------------------------------------------
    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Monitor:
        """Register the hooks, as `with` does."""
        self.stop()
        self._handles = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end, always_call=True),
            _optimizers.register_optimizer_step_post_hook(self._stepped),
        ]
        for module in self.layers.values():
            self._handles.append(module.register_forward_hook(self._called))
        return self

    def stop(self) -> None:
        """Remove the hooks. The rows stay."""
        while self._handles:
            self._handles.pop().remove()
        self._stop_counting()

    # --- hooks -------------------------------------------------------------------------------------------
    def _begin(self, module: nn.Module, args: Any) -> None:
        if not module.training or in_backward():
            return
        if not self._driven:
            self._advance()
        if self._sampling and self._count is None and self._counted_step != self.step and not _is_compiled(module):
            self._counted_step, self._count = self.step, StorageCount()
            self._count.__enter__()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        count = self._stop_counting()
        if count is None or output is None or not torch.is_grad_enabled():  # None: the forward raised
            return
        kept = count.memory(output)
        parameter = next(module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        self.memory = replace(kept, peak=process_peak(device) or kept.peak)

    def _stop_counting(self) -> StorageCount | None:
        count, self._count = self._count, None
        if count is not None:
            count.__exit__(None, None, None)
        return count

    def next_step(self) -> None:
        """Count a training step.

        It is for trainers that do not call the model itself. After the first call the model's forwards count no steps.
        """
        self._driven = True
        self._advance()

    def _advance(self) -> None:
        self.step += 1
        self._sampling = (self.step - 1) % self._every == 0

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(p) in self._parameters for group in optimizer.param_groups for p in group["params"][:1]):
            self.optimizer_steps += 1

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        if not module.training:
            return
        name = self._names[id(module)]
        repeated = in_backward()
        kind = "repeated" if repeated else "with gradient" if torch.is_grad_enabled() else "without gradient"
        self._calls[name][kind] += 1
        if self._sampling and not repeated and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            with torch.no_grad(), self._uncounted():
                self._sample(name, module, args[0].detach(), output.detach())

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        count = self._count
        if count is not None:
            count.paused = True
        yield
        if count is not None:
            count.paused = False

    # --- a sample ----------------------------------------------------------------------------------------
    def _sample(self, name: str, module: Any, input: Tensor, output: Tensor) -> None:
        if input.dim() < 2 or not input.numel() or not output.numel():
            return
        if getattr(module, "feature_axis", 1) != 1:
            input = input.movedim(module.feature_axis, 1)
        p15, p50, p85 = _percentiles(output.reshape(-1))
        mean, values, effective = _effective(input)
        drift, log2_drift, lag = self._moved(name, module, mean)
        updates = self._updates_a_step(name, module)
        row = Row(self.step, name, p15, p50, p85, drift, log2_drift, lag, values, effective, updates)
        self.rows.append(row)
        if self._writer is not None:
            for key, value in asdict(row).items():
                if key not in ("step", "layer") and value == value:
                    self._writer.add_scalar(f"batchnorm/{name or 'model'}/{key}", value, self.step)

    def _moved(self, name: str, module: Any, mean: Tensor) -> tuple[float, float, float]:
        """Compute drift and log2_drift since the layer's last row, and the lag of the batch."""
        if module.running_mean is None:
            return 0.0, 0.0, 0.0
        now = (module.running_mean.float().clone(), module.running_var.float().clone())
        before = self._last.get(name, now)
        self._last[name] = now
        sigma = (now[1] + module.eps).sqrt()
        drift = ((now[0] - before[0]) / sigma).square().mean().sqrt()
        log2 = ((now[1] + module.eps) / (before[1] + module.eps)).log2().square().mean().sqrt()
        lag = ((mean - now[0]) / sigma).square().mean().sqrt()
        found: list[float] = torch.stack([drift, log2, lag]).tolist()
        return found[0], found[1], found[2]

    def _updates_a_step(self, name: str, module: Any) -> float:
        """Compute the updates per step by the layer's own counter, which includes updates without a hook."""
        if module.num_batches_tracked is None:
            return float("nan")
        now = (int(module.num_batches_tracked), self.optimizer_steps)
        before = self._counted.get(name)
        self._counted[name] = now
        if before is None or now[1] == before[1]:
            return float("nan")
        return (now[0] - before[0]) / (now[1] - before[1])

    # --- results -----------------------------------------------------------------------------------------
    def accounting(self) -> dict[str, dict[str, float]]:
        """Count the training calls of each layer.

        Returns:
            By layer: "with gradient"; "without gradient", which update the statistics too and often mean a missing
            ``.eval()``; "repeated", the recomputations of activation checkpointing in a backward; and "a step", the
            calls with gradient per optimizer step. More than 1 means gradient accumulation, or several forwards per
            step as in adversarial training.
        """
        steps = self.optimizer_steps
        return {
            name: {
                "with gradient": calls["with gradient"],
                "without gradient": calls["without gradient"],
                "repeated": calls["repeated"],
                "a step": calls["with gradient"] / steps if steps else float("nan"),
            }
            for name, calls in self._calls.items()
        }

    def table(self) -> str:
        """Make a plain text table of the last row of every layer and its accounting."""
        latest = {row.layer: row for row in self.rows}
        keys = ("p15", "p50", "p85", "drift", "lag", "effective")
        width = max(len("layer"), *(len(name) for name in self.layers))
        heading = f"{'layer':<{width}}  {'step':>6}" + "".join(f"{key:>10}" for key in keys)
        lines = [heading + f"{'calls':>8}{'no grad':>9}{'repeated':>9}{'a step':>8}"]
        for name, counts in self.accounting().items():
            row = latest.get(name)
            numbers = "".join(f"{getattr(row, key):>10.3g}" if row else f"{'-':>10}" for key in keys)
            lines.append(
                f"{name:<{width}}  {row.step if row else '-':>6}{numbers}{counts['with gradient']:>8}"
                f"{counts['without gradient']:>9}{counts['repeated']:>9}{counts['a step']:>8.3g}"
            )
        return "\n".join(lines)


def _is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile made a part of the model: it runs eagerly where operators are counted."""
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules())


def _percentiles(values: Tensor) -> list[float]:
    """Compute the percentiles with linear interpolation.

    `torch.quantile` sorts. Selecting the two neighbors of each percentile takes a fourth of its time.
    """
    sampled = values[:: max(1, values.numel() // _SAMPLED_VALUES)].float()
    found = []
    for percentile in PERCENTILES:
        position = percentile * (len(sampled) - 1)
        low, high = (float(sampled.kthvalue(min(int(position) + k, len(sampled))).values) for k in (1, 2))
        found.append(low + (high - low) * (position % 1))
    return found


def _effective(input: Tensor) -> tuple[Tensor, int, float]:
    """Compute the batch's mean (C,), the number of values per channel, and `Row.effective`.

    The last is N·σ² over the variance of the samples' means, at most the number of values, averaged over channels.
    """
    x = input.float()
    samples, values = x.size(0), x.numel() // max(1, x.size(1))
    each = x.flatten(2).mean(2) if x.dim() > 2 else x
    mean = each.mean(0)
    if x.dim() == 2 or samples < 2:
        return mean, values, float(samples)
    total = x.transpose(0, 1).flatten(1).var(1, correction=0)
    effective = samples * total / each.var(0).clamp(min=1e-30)
    alive = total > 0
    found = float(effective[alive].clamp(max=values).mean()) if alive.any() else float(samples)
    return mean, values, found
