"""Callbacks that attach a `Monitor` in Lightning and in the Trainer of transformers.

This package needs neither library. Each is imported when its callback is made.
"""

from __future__ import annotations

import importlib
from typing import Any

from .errors import UserError
from .monitor import Monitor, Writer

__all__ = ["lightning_callback", "transformers_callback"]


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
    base = _first("lightning", "lightning.pytorch.callbacks:Callback", "pytorch_lightning.callbacks:Callback")

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
    base = _first("transformers", "transformers:TrainerCallback")

    class TransformersMonitor(base):  # type: ignore[valid-type,misc]  # the base class is imported at run time
        monitor: Monitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.monitor = Monitor(model, every=every, writer=writer).start()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _stop(self.monitor)

    return TransformersMonitor()


def _first(library: str, *names: str) -> Any:
    """Import the first of the classes ``module:class`` whose library is installed."""
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError:
            continue
    raise UserError(f"{library} is not installed, its callback needs it, install it with pip install {library}")


def _tensorboard_of(trainer: Any) -> Writer | None:
    loggers = getattr(trainer, "loggers", None) or []
    writers = [getattr(logger, "experiment", None) for logger in loggers]
    return next((w for w in writers if hasattr(w, "add_scalar")), None)


def _stop(monitor: Monitor | None) -> None:
    if monitor is not None:
        monitor.stop()
