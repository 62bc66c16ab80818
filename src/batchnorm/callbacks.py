"""Callbacks for Lightning and for the Trainer of transformers: a `Monitor`, or the doctor after each epoch.

This package needs neither library. Each is imported when its callback is made, or its class is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from .doctor import Diagnosis, diagnose
from .doctor.evidence.input_batches import as_batch
from .errors import UserError
from .factories import import_first
from .inspect.untouched import generators_kept
from .model_tools import Recalibration, recalibrate
from .monitor import Monitor, Writer

__all__ = ["LightningDoctor", "TransformersDoctor", "lightning_callback", "transformers_callback"]


class _Doctor:
    """Examines the model at the end of each epoch, and warns once about each finding.

    Args:
        batches: number of training batches to look at.
        recalibrate: set the running statistics to those of these batches before each validation.
        select, ignore: as `diagnose` takes them.

    Attributes:
        diagnosis: the last one.
        recalibration: the last one.
    """

    def __init__(
        self,
        *,
        batches: int = 32,
        recalibrate: bool = False,
        select: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] | None = None,
    ) -> None:
        if batches < 1:
            raise UserError(f"batches is {batches}, the doctor's callback, give at least 1")
        self.batches, self.recalibrate = batches, recalibrate
        self.select, self.ignore = select, ignore
        self.diagnosis: Diagnosis | None = None
        self.recalibration: Recalibration | None = None
        self._said: set[tuple[str, str]] = set()

    def _examine(self, model: nn.Module, batches: list[Any]) -> None:
        if not batches:
            return
        self.diagnosis = diagnose(model, batches, select=self.select, ignore=self.ignore)
        for finding in self.diagnosis.findings:
            if finding.severity != "info" and (finding.code, finding.module) not in self._said:
                self._said.add((finding.code, finding.module))
                warnings.warn(str(finding), stacklevel=2)

    def _recalibrate(self, model: nn.Module, batches: list[Any]) -> None:
        if self.recalibrate and batches:
            self.recalibration = recalibrate(model, batches, forward=lambda m, raw: as_batch(raw, m).call(m))


class _LightningDoctor(_Doctor):
    __doc__ = _Doctor.__doc__

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._kept: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        self._kept = []

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        if len(self._kept) < self.batches:
            self._kept.append(batch)

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if not getattr(trainer, "sanity_checking", False):
            self._recalibrate(pl_module, self._kept)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self._examine(pl_module, self._kept)


class _TransformersDoctor(_Doctor):
    __doc__ = _Doctor.__doc__

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if control.should_evaluate:
            self._recalibrate(given["model"], self._some(given))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        batches = self._some(given)
        if control.should_evaluate:
            self._recalibrate(given["model"], batches)
        self._examine(given["model"], batches)

    def _some(self, given: dict[str, Any]) -> list[Any]:
        with generators_kept():  # a shuffling loader draws from them
            return list(islice(given.get("train_dataloader") or (), self.batches))


_CLASSES = {
    "LightningDoctor": (
        _LightningDoctor,
        ("lightning", "lightning.pytorch.callbacks:Callback", "pytorch_lightning.callbacks:Callback"),
    ),
    "TransformersDoctor": (_TransformersDoctor, ("transformers", "transformers:TrainerCallback")),
}

if TYPE_CHECKING:
    LightningDoctor = _LightningDoctor
    TransformersDoctor = _TransformersDoctor


def __getattr__(name: str) -> Any:
    """Make a callback's class when it is asked for first, because its base class comes from its library."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hooks, where = _CLASSES[name]
    made = type(name, (hooks, import_first(*where)), {"__doc__": hooks.__doc__, "__module__": __name__})
    globals()[name] = made
    return made


def lightning_callback(*, every: int = 50, writer: Writer | None = None) -> Any:
    """Make a Lightning callback that watches the module from the start of training to its end or to an exception.

    Args:
        every: measure one of this many training steps.
        writer: where the rows are written; None: the trainer's TensorBoard logger, if it has one.

    Returns:
        The callback. Its `monitor` has the rows.

    Raises:
        UserError: neither lightning nor pytorch_lightning is installed.
    """
    base = import_first("lightning", "lightning.pytorch.callbacks:Callback", "pytorch_lightning.callbacks:Callback")

    class LightningMonitor(base):  # type: ignore[valid-type,misc]  # the base class is imported at run time
        monitor: Monitor | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            chosen = writer or _tensorboard_of(trainer)
            self.monitor = Monitor(pl_module, every=every, writer=chosen).start()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            # Lightning calls training_step, which may use the parts of the module without calling the module.
            if self.monitor is not None:
                self.monitor.next_step()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            _stop(self.monitor)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            _stop(self.monitor)

    return LightningMonitor()


def transformers_callback(*, every: int = 50, writer: Writer | None = None) -> Any:
    """Make a `TrainerCallback` that watches the model from the start of training to its end.

    Args:
        every: measure one of this many training steps.
        writer: where the rows are written; None: they are in the monitor only.

    Returns:
        The callback. Its `monitor` has the rows.

    Raises:
        UserError: transformers is not installed.
    """
    base = import_first("transformers", "transformers:TrainerCallback")

    class TransformersMonitor(base):  # type: ignore[valid-type,misc]  # the base class is imported at run time
        monitor: Monitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.monitor = Monitor(model, every=every, writer=writer).start()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _stop(self.monitor)

    return TransformersMonitor()


def _tensorboard_of(trainer: Any) -> Writer | None:
    loggers = getattr(trainer, "loggers", None) or []
    writers = [getattr(logger, "experiment", None) for logger in loggers]
    return next((w for w in writers if hasattr(w, "add_scalar")), None)


def _stop(monitor: Monitor | None) -> None:
    if monitor is not None:
        monitor.stop()
