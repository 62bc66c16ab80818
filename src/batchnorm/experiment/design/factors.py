"""Batch size and optimizer as factors: which levels are run beside the study, at which rates and for how many updates.

One factor at a time, as with weight decay and dropout: every batch size under the study's own optimizer, and every
optimizer at its own batch size. A level goes through a grid of learning rates under the choosing seeds, arm by arm;
the measuring seeds then run at each arm's best and at its fastest rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch

from ...errors import UserError, quote_error
from ..data.dataset import Dataset
from ..training.networks import Architecture
from ..training.runs import Run
from .parsing import FULL
from .plan import StudyPlan, rate_grid
from .selection import choose_fastest, choose_rates, rows_at

BATCH_SIZE, OPTIMIZER = 60, "sgd"
# A level gets as many updates as the study's own runs. A smaller batch gets more, until it has seen as many samples,
# but at most this many times as many updates.
MOST_UPDATES = 8
# torch's default. Without weight decay AdamW is Adam.
ADAMW_DECAY = 0.01

Rates = dict[str, tuple[float, float]]  # an arm's best and its fastest learning rate


@dataclass(frozen=True)
class Level:
    """One batch size and one optimizer, with what every run at it shares."""

    factor: str
    name: str
    batch_size: int
    optimizer: str
    weight_decay: float
    lrs: tuple[float, ...]
    steps: int

    @property
    def words(self) -> str:
        """Return the level as a sentence speaks of it."""
        if self.factor == "optimizer":
            return self.name
        return "the full batch" if self.name.startswith("full") else f"batch size {self.name}"

    @property
    def where(self) -> str:
        """Return the level with its preposition, as in "at batch size 8"."""
        return f"with {self.words}" if self.factor == "optimizer" else f"at {self.words}"

    def run(self, arm: str, purpose: str, seed: int, lr: float) -> Run:
        """Return one training at this level."""
        return Run(arm, purpose, seed, lr, self.weight_decay, 0.0, self.batch_size, self.optimizer, self.steps)

    def rows(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of runs.csv at this level."""
        own = {"batch_size": self.batch_size, "optimizer": self.optimizer, "weight_decay": self.weight_decay}
        return rows_at(runs, **own, dropout=0)


@dataclass(frozen=True)
class Factors:
    """The levels beside the study's own. `impossible` has a sentence for each (level, arm) that cannot train."""

    batch_sizes: tuple[Level, ...] = ()
    optimizers: tuple[Level, ...] = ()
    impossible: Mapping[tuple[Level, str], str] = field(default_factory=dict)

    @property
    def levels(self) -> tuple[Level, ...]:
        return self.batch_sizes + self.optimizers

    def to_json(self) -> dict[str, Any]:
        """Return what decides the added runs as JSON types; nothing where there are none."""
        sizes, names = [lv.batch_size for lv in self.batch_sizes], [lv.optimizer for lv in self.optimizers]
        lrs = {level.optimizer: list(level.lrs) for level in self.optimizers}
        entries = {"batch_sizes": sizes, "optimizers": names, "optimizer_lrs": lrs}
        return {name: value for name, value in entries.items() if value}


def own_level(batch_sizes: Sequence[int] | None, optimizers: Sequence[str] | None) -> tuple[int, str]:
    """Return the batch size and the optimizer of the study itself: the defaults if they are among those given, else
    the first given (the first that is not 1).
    """
    sizes, names = batch_sizes or (BATCH_SIZE,), optimizers or (OPTIMIZER,)
    size = BATCH_SIZE if BATCH_SIZE in sizes else next(size for size in sizes if size != 1)
    return size, OPTIMIZER if OPTIMIZER in names else names[0]


def fit_batch_sizes(sizes: Sequence[int] | None, plan: StudyPlan, samples: int) -> tuple[tuple[int, ...], StudyPlan]:
    """Return the sizes and the plan with FULL replaced by the number of training samples.

    Raises:
        UserError: a size larger than the training part, or ``full`` beside the number that it is.
    """
    if sizes is None:
        return (), plan
    for size in sizes:
        if size > samples:
            raise UserError(
                f"batch of {size} from {samples} training samples, study(batch_size=…), give at most {samples}, or full"
            )
    if FULL in sizes and samples in sizes:
        raise UserError(f"full is {samples} and named twice, study(batch_size=…), leave out one of full and {samples}")
    fitted = tuple(size or samples for size in sizes)
    return fitted, replace(plan, batch_size=plan.batch_size or samples)


def design(
    plan: StudyPlan,
    batch_sizes: Sequence[int],
    optimizers: Sequence[str],
    model: str,
    *,
    quick: bool,
    own_lrs: bool,
    architecture: Architecture,
    data: Dataset,
) -> Factors:
    """Return the levels of each factor, the study's own among them; a factor with one level is none.

    Args:
        plan: the study's own runs.
        batch_sizes, optimizers: all levels, in the order in which they are shown.
        own_lrs: whether the user gave the rates, which then serve every optimizer.
        architecture, data: to find out which arm cannot be trained at which batch size.
    """
    samples = data.size("train")

    def level(factor: str, name: str, size: int, optimizer: str) -> Level:
        grid = plan.lrs if own_lrs or optimizer == plan.optimizer else rate_grid(model, optimizer, quick)
        lrs = grid if own_lrs else _for_smaller(grid, optimizer, size / min(plan.batch_size, samples))
        decay = ADAMW_DECAY if optimizer == "adamw" and optimizer != plan.optimizer else 0.0
        return Level(factor, name, size, optimizer, decay, lrs, _updates(plan, size, samples))

    sizes = tuple(
        level("batch_size", f"full ({size})" if size == samples else str(size), size, plan.optimizer)
        for size in (batch_sizes if len(batch_sizes) > 1 else ())
    )
    names = tuple(
        level("optimizer", name, plan.batch_size, name) for name in (optimizers if len(optimizers) > 1 else ())
    )
    return Factors(sizes, names, _impossible(sizes, plan, architecture, data))


def _updates(plan: StudyPlan, size: int, samples: int) -> int:
    """Return how many updates a run takes at a batch size (see MOST_UPDATES)."""
    same_samples = round(plan.steps * min(plan.batch_size, samples) / min(size, samples))
    return min(max(plan.steps, same_samples), MOST_UPDATES * plan.steps)


def _impossible(
    sizes: tuple[Level, ...], plan: StudyPlan, architecture: Architecture, data: Dataset
) -> dict[tuple[Level, str], str]:
    """Return, for each arm and batch size at which it cannot train, why; the study's own size was tried before."""
    return {
        (size, arm): why
        for size in sizes
        for arm in plan.arms
        if size.batch_size != plan.batch_size and (why := _why_impossible(architecture, size, arm, plan, data))
    }


def _for_smaller(lrs: tuple[float, ...], optimizer: str, share: float) -> tuple[float, ...]:
    """Return the rates for a batch that is a `share` of the study's: lower by the nearest number of decades.

    The largest rate that trains falls with the batch (Goyal et al. 2017), for Adam with its root (Malladi et al. 2022).
    A larger batch keeps the rates, which reach up to divergence as they are.
    """
    decades = math.log10(share) / (2 if optimizer.startswith("adam") else 1)
    return tuple(float(f"{lr * 10 ** min(0, round(decades)):.3g}") for lr in lrs)


def _why_impossible(architecture: Architecture, level: Level, arm: str, plan: StudyPlan, data: Dataset) -> str | None:
    """Return why the arm cannot take one training step at this batch size, None when it can."""
    batch, _ = next(data.batches(level.batch_size, 0))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = replace(architecture, batch_size=level.batch_size).build(arm, plan.measure_seeds[0])
        try:
            model.train()(batch)
        except Exception as error:
            if "more than 1 value per channel" in str(error):
                return (
                    f"in a batch of {level.batch_size} some unit has a single value, "
                    "which has no variance to normalize by"
                )
            return f"the network fails on a batch of {level.batch_size} ({quote_error(error)})"
    return None


def added_levels(factors: Factors, plan: StudyPlan) -> list[Level]:
    """Return the levels that the study's own runs do not cover."""
    own = (plan.batch_size, plan.optimizer)
    return [level for level in factors.levels if (level.batch_size, level.optimizer) != own]


def possible_arms(factors: Factors, level: Level, plan: StudyPlan) -> list[str]:
    """Return the arms that can train at a level, in the study's order."""
    return [arm for arm in plan.arms if (level, arm) not in factors.impossible]


def most_runs(factors: Factors, plan: StudyPlan) -> int:
    """Return how many runs the factors add at most: an arm whose best rate is its fastest needs fewer."""
    return sum(
        len(possible_arms(factors, level, plan))
        * (len(level.lrs) * len(plan.choose_seeds) + min(2, len(level.lrs)) * len(plan.measure_seeds))
        for level in added_levels(factors, plan)
    )


def runs_to_choose(factors: Factors, plan: StudyPlan) -> list[Run]:
    """Return the choosing runs of every level beside the study's own."""
    return [
        level.run(arm, "choose", seed, lr)
        for level in added_levels(factors, plan)
        for arm in possible_arms(factors, level, plan)
        for lr in level.lrs
        for seed in plan.choose_seeds
    ]


def runs_to_measure(factors: Factors, plan: StudyPlan, chosen: Mapping[Level, Rates]) -> list[Run]:
    """Return the measuring runs, at each arm's best and at its fastest rate."""
    return [
        level.run(arm, "measure", seed, lr)
        for level, rates in chosen.items()
        for arm, pair in rates.items()
        for lr in dict.fromkeys(pair)
        for seed in plan.measure_seeds
    ]


def choose_level_rates(factors: Factors, plan: StudyPlan, runs: pd.DataFrame) -> dict[Level, Rates]:
    """Return each arm's best and fastest rate at each added level, from its `choose` rows with `steps_to_target`."""
    found = {}
    for level in added_levels(factors, plan):
        arms = possible_arms(factors, level, plan)
        # A level's weight decay belongs to its optimizer and is not varied: the choice is made as if there were none.
        rows = level.rows(runs).assign(weight_decay=0.0)
        if arms:
            best, fastest = choose_rates(rows, arms), choose_fastest(rows, arms)
            choosing = rows[(rows["purpose"] == "choose") & ~rows["diverged"] & rows["steps_to_target"].notna()]
            # An arm of which no run reaches the target has no fastest rate.
            found[level] = {arm: (best[arm], (fastest if arm in set(choosing["arm"]) else best)[arm]) for arm in arms}
    return found
