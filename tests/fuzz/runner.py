"""Runs targets for a time, keeps what is found, and counts what was tried."""

from __future__ import annotations

import random
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from .compare import Discard, Refused
from .program import Case, load
from .targets import TARGETS

__all__ = ["Finding", "Log", "fuzz", "run_case"]

_ROUND = 60  # examples of one seed


class _Over(BaseException):
    """The time is over; hypothesis lets it through."""


@dataclass
class Finding:
    """A case that fails, as small as it got."""

    case: Case
    error: BaseException
    seed: int

    @property
    def signature(self) -> str:
        """What went wrong, without the numbers in it."""
        words = re.sub(r"0x[0-9a-f]+|[\d.]+(e[-+]?\d+)?|'[^']*'", "#", f"{type(self.error).__name__}: {self.error}")
        return words.split("\n")[0][:120]

    def text(self) -> str:
        frames = traceback.extract_tb(self.error.__traceback__)[-4:]
        where = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in frames]
        lines = [f"seed {self.seed}", *where, *f"{type(self.error).__name__}: {self.error}".splitlines()]
        return "\n".join([self.case.text(), "", *(f"# {line}" for line in lines), ""])


@dataclass
class Log:
    """What one target tried."""

    target: str
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))
        return f"{self.target}: {self.seconds:.0f} s, {counts or 'nothing ran'}, {len(self.findings)} findings"


def run_case(case: Case) -> str:
    """Run one case: "agreed", "refused" or "discarded"; a failure raises."""
    torch.manual_seed(0)
    try:
        load(case.text()).test_found()
    except Refused:
        return "refused"
    except Discard:
        return "discarded"
    return "agreed"


def fuzz(
    target: str,
    seconds: float,
    *,
    start: int | None = None,
    database: Path | None = None,
    limit: int = 20,
    grace: float = 45.0,
    cases: int = 0,
    say: Callable[[str], Any] = print,
) -> Log:
    """Draw and run cases for that long, one seed after the other.

    What was found once, and is found again with all the features of the smallest case, is counted as known, so that it
    hides nothing else.

    Args:
        target: a key of `TARGETS`.
        seconds: the time for it.
        start: the first seed; None draws one.
        database: a folder in which hypothesis keeps failing examples for the next run.
        limit: findings after which the target ends.
        grace: seconds beyond its time in which a case may go on being shrunk.
        cases: end after about so many; 0 is no limit.
        say: where lines of progress go.
    """
    log = Log(target)
    begin = time.monotonic()
    number = random.SystemRandom().randrange(10**6) if start is None else start
    examples = min(cases or _ROUND, _ROUND)
    while time.monotonic() - begin < seconds and len(log.findings) < limit:
        spent, tried = time.monotonic() - begin, sum(log.outcomes.values())
        say(f"{target}: seed {number}, {spent:.0f} of {seconds:.0f} s, {tried} cases")
        finding = _round(log, number, begin + seconds, grace, examples, database)
        if finding is not None:
            log.findings.append(finding)
            say(f"{target}: FOUND {finding.signature}")
        if 0 < cases <= sum(log.outcomes.values()):
            break
        number += 1
    log.seconds = time.monotonic() - begin
    return log


def _round(log: Log, number: int, end: float, grace: float, examples: int, database: Path | None) -> Finding | None:
    """One seed's examples; the smallest failing case among them, or None."""
    smallest: list[Finding] = []

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, derandomize=False, report_multiple_bugs=False,
        phases=[Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        database=None if database is None else DirectoryBasedExampleDatabase(database / log.target),
    )  # fmt: skip
    @given(TARGETS[log.target].CASES)
    def one(case: Case) -> None:
        if time.monotonic() > end + (grace if smallest else 0):
            raise _Over
        try:
            outcome = run_case(case)
        except Exception as error:
            found = Finding(case, error, number)
            known = _known(found, log.findings)
            log.outcomes["known" if known else "failed"] += 1
            if known:
                return
            if not smallest or len(case.text()) <= len(smallest[0].case.text()):
                smallest[:] = [found]
            raise
        log.outcomes[outcome] += 1
        log.kinds.update(case.features())
        assume(outcome != "discarded")

    try:
        one()
    except _Over:
        pass
    except Exception:
        if not smallest:  # hypothesis itself
            raise
    return smallest[0] if smallest else None


def _known(found: Finding, before: list[Finding]) -> bool:
    features = found.case.features()
    return any(f.signature == found.signature and f.case.features() - _PLAIN <= features for f in before)


# What a smallest case holds because it has to hold something.
_PLAIN = {"eval", "train", "contiguous", "float64", "float32"}
