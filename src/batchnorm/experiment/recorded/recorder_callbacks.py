"""A recorder as a callback of Lightning and of transformers' Trainer. Each library is imported when it is asked for."""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ...factories import import_first
from .recorder import StudyRecorder


def recorder_for_lightning(recorder: StudyRecorder, monitor: str = "val_acc", test: str | None = None) -> Any:
    """Return a Lightning callback that records the run.

    Args:
        recorder: not entered yet: the callback begins it with the fit and ends it where the fit or the test ends.
        monitor: what `LightningModule.log` calls the validation metric.
        test: what it calls the test metric; with it the run is written when `Trainer.test` has ended.

    Raises:
        UserError: Lightning is not installed; in the fit, that the module logs no metric of this name.
    """
    base = import_first("lightning", "lightning.pytorch.callbacks:Callback", "pytorch_lightning.callbacks:Callback")

    class RecordRun(base):  # type: ignore[valid-type,misc]  # the base class is imported at run time
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            recorder.__enter__()

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking and trainer.is_global_zero:
                recorder.log(trainer.global_step, _metric(trainer.callback_metrics, monitor))

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            if test is None and trainer.is_global_zero:
                recorder.__exit__(None, None, None)

        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            if test is not None and trainer.is_global_zero:
                recorder.log(trainer.global_step, _metric(trainer.callback_metrics, test), "test")
                recorder.__exit__(None, None, None)

    return RecordRun()


def recorder_for_transformers(recorder: StudyRecorder, monitor: str = "eval_accuracy") -> Any:
    """Return a `TrainerCallback` that records the run's evaluations.

    Args:
        recorder: not entered yet: the callback begins it with the training and writes it when the training has ended.
        monitor: the name of the metric among those of an evaluation.

    Raises:
        UserError: transformers is not installed; in the training, that an evaluation has no metric of this name.
    """
    base = import_first("transformers", "transformers:TrainerCallback")

    class RecordRun(base):  # type: ignore[valid-type,misc]  # the base class is imported at run time
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            recorder.__enter__()

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            if state.is_world_process_zero:
                recorder.log(state.global_step, _metric(metrics or {}, monitor))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                recorder.__exit__(None, None, None)

    return RecordRun()


def _metric(metrics: Any, name: str) -> float:
    if name not in metrics:
        found = ", ".join(sorted(str(key) for key in metrics)[:12]) or "none"
        raise UserError(f"no metric {name!r} among those logged ({found}), the recorder's monitor, name one of them")
    return float(metrics[name])
