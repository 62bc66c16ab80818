"""One training run, from a seed to a row and a trace. It does not know of files, processes or other runs."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ...inspect.from_run import graph_of_run
from ...inspect.modules import is_layer
from ...inspect.untouched import modes_and_buffers_kept
from ..data.dataset import Dataset
from ..data.splits import HELD_OUT
from .networks import Architecture
from .optimizers import make_optimizer
from .probe import Probe, affine_parameters, drift_of_run
from .runs import Run

EVALUATIONS = 40
_EVALUATION_BATCH = 1024


def evaluation_steps(steps: int) -> list[int]:
    """Return the steps after which a run is evaluated: 0, 1, 2, 3, … in a roughly constant ratio up to `steps`."""
    return sorted({0, *(round(step) for step in np.geomspace(1, steps, EVALUATIONS))})


@dataclass
class History:
    """A network in training, and what it has shown so far: one entry an evaluation.

    `held_out` has x and y of the validation and of the test part.
    """

    model: nn.Module
    held_out: dict[str, tuple[Tensor, Tensor]]
    probe: Probe
    steps: list[int] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    percentiles: list[list[list[float]]] = field(default_factory=list)
    test_accuracy: float = 0.0  # at the best evaluation, as is `affine`
    affine: list[dict[str, Any]] = field(default_factory=list)

    def evaluate(self, step: int, losses: list[float]) -> bool:
        """Add an evaluation; return False, adding nothing, for a network that is not finite."""
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            return False
        accuracy = accuracy_of(self.model, *self.held_out["validation"])
        percentiles = self.probe.percentiles(self.model)
        if accuracy is None or not np.isfinite(percentiles).all():
            return False
        if accuracy > max(self.val_accuracy, default=-1.0):
            test_accuracy = accuracy_of(self.model, *self.held_out["test"])
            if test_accuracy is None:
                return False
            self.test_accuracy, self.affine = test_accuracy, affine_parameters(self.model)
        self.steps.append(step)
        self.val_accuracy.append(accuracy)
        self.train_loss.append(float(np.mean(losses)) if losses else None)
        self.percentiles.append(percentiles)
        return True

    def drift(self) -> float | None:
        """Return the drift of the percentiles; None where there are none, or none that are finite."""
        values = np.asarray(self.percentiles, dtype=np.float64)
        drift = drift_of_run(values) if values.ndim == 3 else math.nan
        return drift if math.isfinite(drift) else None


def train(run: Run, architecture: Architecture, data: Dataset) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the row and the trace of one run; `steps_to_target` is left empty, because it needs the other runs.

    It is deterministic: the seed sets the initialization and, independently of it, the order of the batches and the
    dropout masks. A loss or a network that is no longer finite ends the run as diverged. That is a result too: the
    accuracies are then those of always answering the most frequent class.
    """
    started = time.perf_counter()
    with one_thread_deterministic():
        held_out = {part: (torch.from_numpy(data.x[part]), torch.from_numpy(data.y[part])) for part in HELD_OUT}
        model = replace(architecture, batch_size=run.batch_size).build(run.arm, run.seed)
        if architecture.dropout == "replace" or run.dropout:
            set_dropout(model, run.dropout, data.example)
        history = History(model, held_out, Probe(model, held_out["validation"][0]))
        torch.manual_seed(run.seed)
        diverged = not _learn(run, history, data.batches(run.batch_size, run.seed))
    row = {
        "run_id": run.run_id,
        **asdict(run),
        "steps_to_target": None,
        "val_accuracy": data.chance("validation") if diverged else max(history.val_accuracy),
        "test_accuracy": data.chance("test") if diverged else history.test_accuracy,
        "final_val_accuracy": data.chance("validation") if diverged else history.val_accuracy[-1],
        "train_loss": None if diverged else history.train_loss[-1],
        "drift": history.drift(),
        "diverged": diverged,
        "seconds": round(time.perf_counter() - started, 3),
    }
    trace = {
        "run_id": run.run_id,
        **{key: getattr(history, key) for key in ("steps", "val_accuracy", "train_loss")},
        "percentiles": history.probe.to_json(history.percentiles),
        "affine": history.affine,
    }
    return row, trace


def _learn(run: Run, history: History, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
    """Train for the run's steps with evaluations; return False as soon as something is not finite."""
    model = history.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(run.optimizer, parameters, run.lr, run.weight_decay)
    evaluate_after = set(evaluation_steps(run.steps))
    losses: list[float] = []
    model.train()
    for step in range(run.steps + 1):
        if step > 0:
            losses.append(update(model, optimizer, *next(batches)))
            if not math.isfinite(losses[-1]):
                return False
        if step in evaluate_after:
            if not history.evaluate(step, losses):
                return False
            losses.clear()
    return True


def update(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    """Take one step down the loss of a batch and return the loss; one that is not finite changes nothing."""
    loss = F.cross_entropy(model(x), y)
    value = loss.item()
    if math.isfinite(value):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return value


def accuracy_of(model: nn.Module, x: Tensor, y: Tensor) -> float | None:
    """Return the share of right answers in evaluation mode, None when a score is not finite."""
    right = 0
    with modes_and_buffers_kept(model):
        model.eval()
        for first in range(0, len(y), _EVALUATION_BATCH):
            scores = model(x[first : first + _EVALUATION_BATCH])
            if not bool(torch.isfinite(scores).all()):
                return None
            right += int((scores.argmax(1) == y[first : first + _EVALUATION_BATCH]).sum())
    return right / len(y)


def has_dropout(model: nn.Module) -> bool:
    """Return whether the network has Dropout modules of its own."""
    return any(isinstance(module, nn.modules.dropout._DropoutNd) for module in model.modules())


def set_dropout(model: nn.Module, p: float, example: Tensor) -> None:
    """Make the study's dropout factor `p` hold in any network.

    A network with Dropout modules has their `p` set. In any other the inputs of all Conv and Linear layers
    but the first called are dropped out, that is, every hidden activation on its way to the next layer.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = p
    if has_dropout(model) or p == 0:
        return

    def drop(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (F.dropout(args[0], p, module.training), *args[1:])

    called = [call.module for call in graph_of_run(model, example, "study").calls]
    layers = [module for module in dict.fromkeys(called) if module is not None and is_layer(module)]
    for module in layers[1:]:
        module.register_forward_pre_hook(drop)


@contextmanager
def one_thread_deterministic() -> Iterator[None]:
    """Run the block on one thread with deterministic algorithms and give torch's global state back after it.

    Reading a network collects garbage. What was made before the block is kept out of that: in a process that holds
    data and libraries, one collection of everything takes longer than many steps.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of a user's network would come again in each of two hundred runs
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            if ours:
                gc.unfreeze()
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
