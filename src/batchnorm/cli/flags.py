"""The flags by the names of the parameters: the functions' errors name these, the command line's those."""

from __future__ import annotations

import re

__all__ = ["with_flags"]

_LIKE_THE_PARAMETER = """
    data model arms out seeds quick resume workers engine address log lrs steps batch_size optimizer
    shapes dtypes layouts cases device threads seconds mask metric step state select ignore
    target chance direction where dropout output_format diff"""
_FLAGS = {name: f"--{name.replace('_', '-')}" for name in _LIKE_THE_PARAMETER.split()}
_FLAGS |= {"batches": "--data", "code": "--explain", "table": "analyze", "subject.target": "doctor"}
_PARAMETER = re.compile(
    r"\b(study|analyze|bench|bench_model|diagnose|subject|read_data|load_state|save_state|page)"
    r"\((\w+)=(…|.*?)\)(?=[ ,;]|$)"
)


def with_flags(sentence: str) -> str:
    """Return the sentence with "--seeds 1" where it says "study(seeds=1)", and "--seeds" for "study(seeds=…)".

    What is no flag stays as it is.
    """
    return _PARAMETER.sub(_flag, sentence)


def _flag(parameter: re.Match[str]) -> str:
    function, name, value = parameter.groups()
    flag = _FLAGS.get(f"{function}.{name}") or _FLAGS.get(name)
    if flag is None:
        return parameter[0]
    return flag if value in ("…", "True") else f"{flag} {value}"
