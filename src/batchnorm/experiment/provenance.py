"""By what and with what a study was made: the versions, the commit, and digests that a resumed study must match."""

from __future__ import annotations

import hashlib
import inspect
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..experiment.networks import BUILT_IN
from ..factories import find_factory


def versions() -> dict[str, Any]:
    """Returns the entries of summary.json that say where and when it was made."""
    return {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": library_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def library_commit() -> str | None:
    """Returns the commit of this library's checkout ("-dirty" when changed), None where it is installed."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository, whose commit says nothing about it.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def model_digest(model: str) -> str | None:
    """Returns a digest of the file that defines a user's network, None for the built-in ones."""
    if model in BUILT_IN:
        return None
    try:
        source = Path(inspect.getsourcefile(inspect.unwrap(find_factory(model))) or "")
        return hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):  # defined without a file
        return None
