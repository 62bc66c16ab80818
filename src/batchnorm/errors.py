"""The one exception for what a user can mend; every other exception is a bug of ours."""

import re

# A terminal's escape sequences go as a whole, so that no "[31m" stays.
_UNPRINTABLE = re.compile(r"(?:\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f\s])+")


class UserError(ValueError):
    """A mistake in what the library was given, in one sentence: what is wrong, where, what to do.

    The command line prints it as ``batchnorm: WHAT, WHERE, WHAT TO DO`` and exits with 2. The sentence may
    quote file names, labels and other people's messages; whatever they hold, it stays on one line and
    carries no terminal escape codes.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(_UNPRINTABLE.sub(" ", str(sentence)).strip())


class KeywordError(UserError, TypeError):
    """A keyword that a function does not take: for `except TypeError`, as Python says it, and for `except ValueError`,
    as everything else is refused here."""


def quote_error(error: BaseException, limit: int = 200) -> str:
    """Return another exception's type and message in at most `limit` characters, for use inside a sentence."""
    message = _UNPRINTABLE.sub(" ", str(error)).strip()
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
