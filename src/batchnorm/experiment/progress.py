"""What the terminal shows while a study runs: a live bar, or a few plain lines where nobody looks on."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress


class _View:
    """A stream to show progress on, or none, and the bar that a terminal gets."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class ProgressView(_View):
    """Counts runs and shows the best accuracy so far. With `stream` None it is silent.

    A terminal gets rich's bar with runs done and time left; anything else (a pipe, a log) a plain line
    for every tenth of the runs, without escape codes.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._total, self._done, self._best = total, done, 0.0
        self._first, self._samples = done, 0

    def __enter__(self) -> ProgressView:
        if self._stream is not None and self._stream.isatty():
            self._bar = _make_bar(self._stream, "study", "runs,")
            self._task = self._bar.add_task("runs", total=self._total, completed=self._done, best="")
            self._bar.start()
        else:
            already = f", {self._done} of them done already" if self._done else ""
            self._say(f"{self._total} training runs{already}")
        return self

    def expect(self, total: int) -> None:
        """Sets the number of runs, once it is known better than at the start."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def finished(self, row: dict[str, Any]) -> None:
        """Takes note of a finished run."""
        self._done += 1
        self._best = max(self._best, row["val_accuracy"])
        self._samples += (
            0 if row["diverged"] else row["steps"] * row["batch_size"]
        )  # where a diverged one ended, no row says
        seconds = max(1e-9, time.monotonic() - self._started)
        state = f"best accuracy {self._best:.1%}, {self._samples / seconds:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, best=state)
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            left = seconds / max(1, self._done - self._first) * (self._total - self._done)
            self._say(f"{self._done}/{self._total} runs, {left:.0f} s left, {state}")

    def _say(self, line: str) -> None:
        if self._stream is not None:
            print(line, file=self._stream, flush=True)


class ReadingView(_View):
    """Counts the samples of a pass over streamed data, a hundredth at a time; shows as `ProgressView` does."""

    def __init__(self, name: str, total: int, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._name, self._total, self._done, self._shown = name, total, 0, 0

    def __enter__(self) -> ReadingView:
        if self._stream is not None and self._stream.isatty():
            self._bar = _make_bar(self._stream, "reading", "hundredths,")
            self._task = self._bar.add_task("reading", total=100, best="")
            self._bar.start()
        return self

    def advance(self, samples: int) -> None:
        """Takes note of samples that were read."""
        self._done += samples
        share = self._done * 100 // self._total
        if share == self._shown or self._stream is None:
            return
        rate = f"{self._done / max(1e-9, time.monotonic() - self._started):,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, best=rate)
        elif share // 10 > self._shown // 10:
            print(f"reading {self._name}: {share} %, {rate}", file=self._stream, flush=True)
        self._shown = share


def _make_bar(stream: TextIO, title: str, unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(compact=True),
        TextColumn("left  {task.fields[best]}"),
        console=Console(file=stream),
    )
