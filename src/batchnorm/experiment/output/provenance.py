"""With what a study was made: the versions and the commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__


def versions() -> dict[str, Any]:
    """Return the entries of summary.json that say where and when it was made."""
    return {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": library_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def library_commit() -> str | None:
    """Return the commit of this library's checkout ("-dirty" when changed), None where it is installed."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside another repository, whose commit says nothing about this library.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
