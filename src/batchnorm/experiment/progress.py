"""What the terminal shows while a study runs: a live bar, or a few plain lines where nobody looks on."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressView:
    """Counts runs and shows the best accuracy so far. With `stream` None it is silent.

    A terminal gets rich's bar with runs done and time left; anything else (a pipe, a log) a plain line
    for every tenth of the runs, without escape codes.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None) -> None:
        self._total, self._done, self._best, self._stream = total, done, 0.0, stream
        self._started, self._first = time.monotonic(), done
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressView:
        if self._stream is not None and self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task("runs", total=self._total, completed=self._done, best="")
            self._bar.start()
        else:
            already = f", {self._done} of them done already" if self._done else ""
            self._say(f"{self._total} training runs{already}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int) -> None:
        """Sets the number of runs, once it is known better than at the start."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def finished(self, row: dict[str, Any]) -> None:
        """Takes note of a finished run."""
        self._done += 1
        self._best = max(self._best, row["val_accuracy"])
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, best=f"best accuracy {self._best:.1%}")
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            rate = (time.monotonic() - self._started) / max(1, self._done - self._first)
            left = rate * (self._total - self._done)
            self._say(f"{self._done}/{self._total} runs, {left:.0f} s left, best accuracy {self._best:.1%}")

    def _say(self, line: str) -> None:
        if self._stream is not None:
            print(line, file=self._stream, flush=True)


def _make_bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("study"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs,"),
        TimeRemainingColumn(compact=True),
        TextColumn("left  {task.fields[best]}"),
        console=Console(file=stream),
    )
