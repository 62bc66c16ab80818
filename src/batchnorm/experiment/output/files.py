"""Writing a file so that nobody ever reads a part of it."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart, finds the old file or the complete new one.

    The text is written beside the file first, flushed to the device, and then moved to its name.
    """
    # With the process number in its name, the partial file of a killed study is not that of the next one.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)  # a full disk must not be kept full
        raise
