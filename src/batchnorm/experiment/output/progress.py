"""What the terminal shows while a study runs: a live bar, or a few plain lines where the output is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress


class _View:
    """A stream to show progress on, or none. A terminal gets a live bar, any other stream plain lines."""

    def __init__(self, stream: TextIO | None, total: int, done: int = 0) -> None:
        self._stream, self._total, self._done = stream, total, done
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def _open_bar(self, title: str, unit: str, total: int) -> bool:
        """Show a bar where the stream is a terminal; return whether it is."""
        if self._stream is None or not self._stream.isatty():
            return False
        self._bar = _make_bar(self._stream, title, unit)
        self._task = self._bar.add_task(title, total=total, completed=self._done, best="")
        self._bar.start()
        return True

    def _say(self, line: str) -> None:
        if self._stream is not None:
            print(line, file=self._stream, flush=True)

    def _seconds(self) -> float:
        return max(1e-9, time.monotonic() - self._started)

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
        super().__init__(stream, total, done)
        self._first, self._best, self._samples = done, 0.0, 0

    def __enter__(self) -> ProgressView:
        if not self._open_bar("study", "runs,", self._total):
            already = f", {self._done} of them done already" if self._done else ""
            self._say(f"{self._total} training runs{already}")
        return self

    def expect(self, total: int) -> None:
        """Set the number of runs, once it is known better than at the start."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def finished(self, row: dict[str, Any]) -> None:
        """Count a finished run."""
        self._done += 1
        self._best = max(self._best, row["val_accuracy"])
        if not row["diverged"]:  # its row does not say after how many steps it ended
            self._samples += row["steps"] * row["batch_size"]
        seconds = self._seconds()
        state = f"best accuracy {self._best:.1%}, {self._samples / seconds:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, best=state)
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            left = seconds / max(1, self._done - self._first) * (self._total - self._done)
            self._say(f"{self._done}/{self._total} runs, {left:.0f} s left, {state}")


class ReadingView(_View):
    """Counts the samples of a pass over streamed data, a hundredth at a time; shows as `ProgressView` does."""

    def __init__(self, name: str, total: int, stream: TextIO | None) -> None:
        super().__init__(stream, total)
        self._name, self._shown = name, 0

    def __enter__(self) -> ReadingView:
        self._open_bar("reading", "hundredths,", 100)
        return self

    def advance(self, samples: int) -> None:
        """Count samples that were read."""
        self._done += samples
        share = self._done * 100 // self._total
        if share == self._shown:
            return
        rate = f"{self._done / self._seconds():,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, best=rate)
        elif share // 10 > self._shown // 10:
            self._say(f"reading {self._name}: {share} %, {rate}")
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
