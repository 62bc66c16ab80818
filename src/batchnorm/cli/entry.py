"""The command line's entry and exit codes.

0 = fine, 1 = findings or a failed comparison, 2 = the user's mistake, one line on stderr; 130 = Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from ..errors import UserError
from .flags import with_flags

__all__ = ["main"]

_EXTRAS = {
    "ray": "ray", "tensorboard": "tensorboard", "mlflow": "mlflow", "sqlalchemy": "mlflow", "alembic": "mlflow"
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (None = the process's own) and return the exit code."""
    try:
        return _invoke(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        return _fail(with_flags(str(error)))
    except KeyboardInterrupt:
        return _fail("interrupted, finished runs are kept in --out, repeat the command with --resume to go on", 130)
    except BrokenPipeError:  # `batchnorm … | head`: nobody reads on, and the exit must not try to flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(sentence: str, code: int = 2) -> int:
    print(f"batchnorm: {UserError(sentence)}", file=sys.stderr)
    return code


def _invoke(arguments: list[str]) -> int:
    try:
        from .app import app
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    try:
        # An exit (--help, --version) comes back as its code, and Ctrl-C as 130 or as Abort, by typer's version.
        code: int = app(arguments, prog_name="batchnorm", standalone_mode=False) or 0
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    except Exception as error:
        # typer's errors have moved between modules from version to version; that they format themselves has not.
        explain = getattr(error, "format_message", None)
        if explain is not None:
            message = (explain() or "nothing to do").rstrip(".").replace("'", "").replace('"', "")
            raise UserError(f"{message}, {shlex.join(['batchnorm', *arguments])}, see --help") from error
        if type(error).__name__ == "Abort":
            raise KeyboardInterrupt from error
        raise
    if code == 130:
        raise KeyboardInterrupt
    return code


def _not_installed(error: ModuleNotFoundError) -> Exception:
    """Return the line for a library that an extra brings; a missing module of ours is a bug and stays itself."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "batchnorm"):
        return error
    extra = _EXTRAS.get(package, "study")
    return UserError(f"{package} is not installed, this Python, install it with pip install 'batchnorm[{extra}]'")
