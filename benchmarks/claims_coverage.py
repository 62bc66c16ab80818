"""How often the study's intervals miss the truth, and its verdicts find what is not there. Writes a table to docs.

    python benchmarks/claims_coverage.py [--draws 400] [--workers 2] [--out docs/claims-coverage.md]

Everything is drawn from laws known exactly (tests/experiment/simulated_study.py); no time is measured.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from batchnorm.experiment.analysis.intervals import CensoredSample, Sample, censored_difference, welch  # noqa: E402  # after the path
from batchnorm.experiment.design.selection import choose_fastest, choose_rates, choose_settings  # noqa: E402  # after the path
from tests.experiment import simulated_study as drawn  # noqa: E402  # after the path

SEEDS = (2, 4, 8)
ARM_LAWS = {
    "plateau of rates": drawn.Law(),
    "three times the noise": drawn.Law(noise=0.012),
    "wide plateau": drawn.Law(width=3, cliff=1.8),
    "narrow peak": drawn.Law(width=0.3, cliff=0.6),
}
# Steps to the target over the grid of rates: where the fastest rate lies, how sharply, and how often runs are lost.
STEP_LAWS = {
    "two rates tie": drawn.Law(width=3, fast=0.25, bend=2),
    "flat, little spread": drawn.Law(width=3, fast=0.25, bend=0.5, spread=0.2),
    "steep, wide spread": drawn.Law(width=3, fast=0.25, bend=4, spread=0.5),
    "accuracy noisy": drawn.Law(width=3, fast=0.25, bend=2, noise=0.012),
    "budget tight": drawn.Law(width=3, fast=0.25, bend=2, speed=-2),
    "fastest loses 7 %": drawn.Law(width=3, fast=1.0, bend=6, spread=0.2, cliff=1.3, speed=3),
    "fastest loses 16 %": drawn.Law(width=3, fast=1.0, bend=3, cliff=1.2, speed=3),
    "fastest loses 30 %": drawn.Law(width=3, fast=1.0, bend=6, spread=0.2, cliff=1.1, speed=3),
}
FASTEST = {"shared": choose_fastest, "luckiest": drawn.luckiest_fastest}
VALUE_LAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "Student, 3 degrees": lambda rng, n: rng.standard_t(3, n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
}
SELECTIONS = {
    "shared": (choose_rates, choose_settings),
    "luckiest": (drawn.luckiest_rates, drawn.luckiest_settings),
}
NAMES = ("convergence", "learning_rate", "weight_decay", "dropout", "generalization", "drift")


def _stream(*cell: object) -> np.random.Generator:
    """Every cell its own draws: with shared ones, a single unlucky stream would look like a pattern of rows."""
    return np.random.default_rng(list(repr(cell).encode()))


def wrong_verdicts(law: str, seeds: int, selection: str, draws: int) -> list[object]:
    """One row: how often each claim finds a difference between two arms that are one network."""
    rng, wrong, silent = _stream(law, seeds, selection), Counter(), 0
    rates, settings = SELECTIONS[selection]
    for _ in range(draws):
        runs = drawn.draw_study(rng, (ARM_LAWS[law], ARM_LAWS[law]), seeds, rates=rates)
        claims = drawn.claims_of(runs, rates, settings)
        wrong.update(name for name, claim in claims.items() if claim.verdict in ("better", "worse"))
        silent += claims["convergence"].estimate is None
    return [
        law,
        seeds,
        selection,
        *(f"{100 * wrong[name] / draws:.1f}" for name in NAMES),
        f"{100 * silent / draws:.0f}",
    ]


def step_rates(law: str, seeds: int, selection: str, draws: int) -> list[object]:
    """One row: convergence between two arms of one network, and with the last arm three times as fast.

    `moved`: the last arm is three times as fast and everything of it lies half a decade, one grid step, higher.
    """
    rng, fastest, first = _stream("steps", law, seeds, selection), FASTEST[selection], STEP_LAWS[law]
    faster = replace(first, speed=first.speed + np.log2(3))
    moved = replace(faster, best=first.best + 0.5, fast=first.fast + 0.5, cliff=first.cliff + 0.5)
    counts: Counter[str] = Counter()
    for _ in range(5 * draws):
        runs = drawn.draw_rates(rng, (first, first), seeds)
        rates, same = fastest(runs, drawn.ARMS), drawn.convergence_of(runs, fastest)
        counts["apart"] += rates["first"] != rates["last"]
        counts["wrong"] += same.verdict in ("better", "worse")
        counts["silent"] += same.estimate is None
    for _ in range(draws):
        for name, last in (("faster", faster), ("moved", moved)):
            claim = drawn.convergence_of(drawn.draw_rates(rng, (first, last), seeds), fastest)
            counts[f"{name} under"] += claim.ci_high is not None and claim.ci_high < 3
            counts[f"{name} over"] += claim.ci_low is not None and claim.ci_low > 3
            counts[f"{name} found"] += claim.verdict == "better"
    shares = [100 * counts[column] / (5 * draws) for column in ("wrong", "apart", "silent")]
    truths = [f"{name} {side}" for name in ("faster", "moved") for side in ("under", "over", "found")]
    shares += [100 * counts[column] / draws for column in truths]
    return [law, seeds, selection, *(f"{share:.1f}" for share in shares)]


def _censor(values: np.ndarray, limit: float) -> CensoredSample:
    seen = values[values <= limit]
    return CensoredSample(seen, len(values) - len(seen), limit, 0.05)


def censored_coverage(law: str, seeds: int, hidden: float, sds: tuple[float, float], draws: int) -> list[object]:
    """One row: how often the interval for the steps holds a true effect of two octaves, or no effect at all."""
    rng, draw = _stream(law, seeds, hidden, sds), VALUE_LAWS[law]
    limit = float(np.quantile(sds[0] * draw(rng, 100_000), 1 - hidden)) if hidden else np.inf
    missed, found, open_sides, wrong = 0, 0, 0, 0
    for _ in range(draws):
        first, second = (sd * draw(rng, seeds) for sd in sds)
        shown = censored_difference(_censor(first, limit), _censor(second - 2, limit))
        missed += not shown.low <= 2 <= shown.high
        found += shown.low > 0
        open_sides += not np.isfinite(shown.high)
        # The same law in both arms: the verdict's own error.
        same = censored_difference(_censor(first, limit), _censor(sds[0] * draw(rng, seeds), limit))
        wrong += same.low > 0 or same.high < 0
    shares = (f"{100 * count / draws:.1f}" for count in (wrong, missed, found, open_sides))
    return [law, f"{sds[0]:g} / {sds[1]:g}", seeds, f"{100 * hidden:.0f} %", *shares]


def lattice_rates(law: str, seeds: int, sd: float, draws: int) -> list[object]:
    """One row: Welch's interval on accuracies that can only be multiples of one sample."""
    rng, draw = _stream(law, seeds, sd), VALUE_LAWS[law]
    wrong, missed = 0, 0
    for _ in range(draws):
        offset = rng.random()
        arms = [np.round(sd * draw(rng, seeds + 2) + offset) for _ in range(2)]
        first, second = (Sample(a[2:], (a[:2],), 1.0) for a in arms)
        shown = welch(first, second)
        wrong += shown.low > 0 or shown.high < 0
        moved = np.round(3 * sd * draw(rng, seeds + 2) + offset + 5)
        shown = welch(first, Sample(moved[2:], (moved[:2],), 1.0))
        missed += not shown.low <= 5 <= shown.high
    return [law, f"{sd:g}", seeds, f"{100 * wrong / draws:.1f}", f"{100 * missed / draws:.1f}"]


def _table(head: str, rows: list[list[object]]) -> str:
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _sections(draws: int, workers: int) -> Iterator[str]:
    run = joblib.Parallel(n_jobs=workers)
    one = joblib.delayed
    limit = 100 * stats.binom.ppf(0.99, draws, 0.05) / draws
    yield (
        f"# How often the study's claims are wrong\n\nMade by `python benchmarks/claims_coverage.py --draws {draws}`. "
        f"Per cent of draws; a claim that errs at 5 % shows at most {limit:.1f} in 99 of 100 cells. What the columns "
        "mean for a reader of the report: [study.md](study.md)."
    )
    cells = [(law, n, "shared") for law in ARM_LAWS for n in SEEDS] + [(law, 4, "luckiest") for law in ARM_LAWS]
    yield (
        "## Two arms that are the same network\n\nPer cent of whole studies (two choosing seeds) in which a claim "
        "says better or worse. `shared`: settings as the study chooses them; `luckiest`: each arm's largest mean, "
        "which the study avoids. Silent: convergence makes no claim, too few runs reaching the target.\n\n"
        + _table(
            "truth | seeds | settings | " + " | ".join(NAMES) + " | silent",
            run(one(wrong_verdicts)(*cell, draws) for cell in cells),
        )
    )
    limit = 100 * stats.binom.ppf(0.99, 5 * draws, 0.05) / (5 * draws)
    cells = [(law, n, "shared") for law in STEP_LAWS for n in SEEDS] + [(law, 4, "luckiest") for law in STEP_LAWS]
    yield (
        f"## Convergence over a grid of rates\n\n{5 * draws} studies a cell for the first three columns of figures, "
        f"of which a claim that errs at 5 % shows at most {limit:.1f} in 99 of 100 cells; {draws} for the others. "
        "Steps bend smoothly around a fastest rate, with Student's tails of 4 degrees; the accuracy's plateau is wide; "
        "runs past a cliff diverge; the target and each arm's fastest rate are found as the study finds them, with two "
        "choosing seeds. Wrong: better or worse between two arms that are one network. Apart: these two were compared "
        "at different rates. Silent: no claim. Faster: the last arm takes a third of the steps at every rate; moved: "
        "besides, all of it lies one grid step higher. Under, over: the interval lies wholly under or over the true "
        "ratio of 3; found: better.\n\n"
        + _table(
            "truth | seeds | rates | wrong | apart | silent | under | over | found | moved: under | over | found",
            run(one(step_rates)(*cell, draws) for cell in cells),
        )
    )
    cells = [
        (law, n, hidden, sds)
        for law in VALUE_LAWS
        for sds in ((0.3, 0.3), (0.5, 0.1))
        for n in SEEDS
        for hidden in (0.0, 0.3, 0.6)
    ]
    yield (
        "## Steps to the target, censored at the budget\n\nOctaves of steps from the law named, standard deviations "
        "of the two arms as given, the budget placed so that the share named of the first arm's runs never arrives. "
        "Wrong: a difference found between two arms of the first law. Missed: a true ratio of 4 outside the "
        "interval. Found: no effect outside it. Open: no upper limit.\n\n"
        + _table(
            "law | sd | seeds | never arrive | wrong | missed | found | open",
            run(one(censored_coverage)(*cell, draws) for cell in cells),
        )
    )
    cells = [(law, n, sd) for law in VALUE_LAWS for n in SEEDS for sd in (0.3, 0.7, 2.0)]
    yield (
        "## Accuracies on the lattice of a small test set\n\nStandard deviation in units of one sample. Wrong: as "
        "above. Missed: a true difference of five samples outside the interval, the second arm three times noisier."
        "\n\n"
        + _table("law | sd | seeds | wrong | missed", run(one(lattice_rates)(*cell, 10 * draws) for cell in cells))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "claims-coverage.md")
    options = parser.parse_args()
    options.out.write_text("\n\n".join(_sections(options.draws, options.workers)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
