"""All arms against the baseline: the claims of each, their verdicts corrected for the number of arms (Holm 1979)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .claims import ESTIMATORS, NOT_MEASURABLE, Claim
from .intervals import LEVEL

ClaimsOf = Callable[[str, float], dict[str, Claim]]
ORDER = ("better", "no difference", "worse", NOT_MEASURABLE)


def compare_all(arms: Sequence[str], claims_of: ClaimsOf) -> dict[str, list[dict[str, Any]]]:
    """Return, by the name of the claim, every arm but the first against the first, sorted from the best to the worst.

    Holm's step-down rule with the intervals themselves: among m arms that are not told from the baseline yet, each
    gets its interval at 1 − 0.05/m; those whose interval excludes no effect are told apart and leave, and the others
    go on with the smaller m. So each verdict follows from the interval beside it, which has the level of its last step,
    and a study of arms equal to the baseline tells any of them apart, by one claim, in at most 5 % of cases.

    Args:
        arms: in the order of the study, the first is the baseline.
        claims_of: the claims of an arm against the baseline with intervals at a level.

    Returns:
        For each claim a list of entries: the arm, the level, and the fields of the claim.
    """
    computed: dict[tuple[str, float], dict[str, Claim]] = {}

    def claims_at(arm: str, level: float) -> dict[str, Claim]:
        if (arm, level) not in computed:
            computed[arm, level] = claims_of(arm, level)
        return computed[arm, level]

    others = list(arms[1:])
    names = list(claims_at(others[-1], _level(len(others)))) if others else []
    return {name: _step_down(others, claims_at, name) for name in names}


def _level(remaining: int) -> float:
    return 1 - (1 - LEVEL) / remaining


def _step_down(arms: Sequence[str], claims_at: ClaimsOf, name: str) -> list[dict[str, Any]]:
    """Return the entries of the claim `name`, sorted."""
    # An arm that allows no claim makes no test and does not count.
    alone = {arm: claims_at(arm, LEVEL)[name] for arm in arms}
    left = [arm for arm in arms if alone[arm].verdict != NOT_MEASURABLE]
    found = {arm: (LEVEL, claim) for arm, claim in alone.items() if arm not in left}
    while left:
        level = _level(len(left))
        found |= {arm: (level, claims_at(arm, level)[name]) for arm in left}
        told = [arm for arm in left if found[arm][1].verdict in ("better", "worse")]
        if not told:
            break
        left = [arm for arm in left if arm not in told]
    sign = 1 if ESTIMATORS[name].larger_is_better else -1

    def rank(arm: str) -> tuple[int, float]:
        claim = found[arm][1]
        return ORDER.index(claim.verdict), -sign * (claim.estimate or 0.0)

    return [{"arm": arm, "level": found[arm][0], **found[arm][1].to_json()} for arm in sorted(arms, key=rank)]
