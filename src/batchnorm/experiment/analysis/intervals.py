"""Intervals for the difference of two arms from a handful of seeds.

Welch's t for values that are all seen, and its extension to values that are only known to lie beyond the
budget (right-censored). The claims are worded elsewhere (`claims.py`).
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A point and its limits. An infinite limit is an open side; a NaN point says that nothing can be said."""

    estimate: float
    low: float
    high: float


NOTHING = Interval(math.nan, -math.inf, math.inf)


def finite_or_none(value: float) -> float | None:
    """Return the number, None for NaN and infinity, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def student_half_width(values: ArrayLike) -> float | None:
    """Return half of Student's 95 % interval of the mean, None for fewer than two values."""
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return None
    return _quantile(LEVEL, len(numbers) - 1) * float(stats.sem(numbers))


def _quantile(level: float, dof: float) -> float:
    """Return how many standard errors an interval at `level` reaches to each side, by Student's law."""
    return float(stats.t.ppf((1 + level) / 2, dof))


@dataclass(frozen=True)
class Sample:
    """One arm's values, a seed each, and what is known of their spread.

    `values` locate the arm. `lenders` are further groups of seeds of the same arm whose own means are ignored:
    selection may have moved their mean, but says nothing of their spread (for a normal law, mean and variance
    of a sample are independent), so they lend degrees of freedom. `resolution` is the step between two possible
    values, such as 1/360 for an accuracy on 360 samples.
    """

    values: Array
    lenders: tuple[Array, ...] = field(default=())
    resolution: float = 0.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def dof(self) -> int:
        return sum(len(group) - 1 for group in (self.values, *self.lenders) if len(group) > 1)

    @property
    def variance(self) -> float:
        """Return the variance of one value, pooled over the groups; at least (resolution / 2)².

        Seeds with equal values are not without noise: a value that is rounded to one of two neighboring steps has a
        standard deviation of up to half a step, and that is the smallest one taken.
        """
        groups = [group for group in (self.values, *self.lenders) if len(group) > 1]
        squares = sum(float(np.sum((group - np.mean(group)) ** 2)) for group in groups)
        return max(squares / self.dof, (self.resolution / 2) ** 2)

    @property
    def mean_variance(self) -> float:
        return self.variance / len(self.values)


def satterthwaite(variances: tuple[float, float], dofs: tuple[int, int]) -> float:
    """Return the degrees of freedom of a sum of two estimated variances (Satterthwaite 1946; Welch 1947)."""
    # Both are divided by the larger one first, because squares of tiny variances would underflow.
    top = max(variances)
    if top == 0:
        return float(min(dofs))
    a, b = (v / top for v in variances)
    return (a + b) ** 2 / (a**2 / dofs[0] + b**2 / dofs[1])


def welch(first: Sample, second: Sample, level: float = LEVEL) -> Interval:
    """Return the mean of `second` minus the mean of `first` with Welch's interval; the arms are not paired.

    NOTHING where an arm has no value, or where no group of seeds shows a spread.
    """
    if min(len(first.values), len(second.values)) < 1 or min(first.dof, second.dof) < 1:
        return NOTHING
    variances = (first.mean_variance, second.mean_variance)
    t = _quantile(level, satterthwaite(variances, (first.dof, second.dof)))
    difference = second.mean - first.mean
    half = t * math.sqrt(sum(variances))
    return Interval(difference, difference - half, difference + half)


@dataclass(frozen=True)
class CensoredSample:
    """Normal values of which those above `limit` are only known to lie there.

    `seen` are the values at or under the limit, `hidden` the number of the others. `floor` is the smallest
    standard deviation believed: how finely a value is known at all.
    """

    seen: Array
    hidden: int
    limit: float
    floor: float

    @property
    def dof(self) -> int:
        return len(self.seen) - 1

    def log_likelihood(self, mean: float, log_sd: float) -> float:
        sd = math.exp(log_sd)
        squares = float(np.sum((self.seen - mean) ** 2))
        value = -len(self.seen) * log_sd - squares / (2 * sd * sd)
        if self.hidden:
            value += self.hidden * float(special.log_ndtr((mean - self.limit) / sd))
        return value

    def best_sd(self, mean: float) -> float:
        """Return the standard deviation that makes the sample likeliest at this mean."""
        rms = math.sqrt(float(np.mean((self.seen - mean) ** 2)))
        low = max(rms, self.floor)
        if not self.hidden:
            return low
        # Hidden values widen the distribution: at most by the distance of the mean from the limit.
        high = low + abs(mean - self.limit) + rms
        bounds = (math.log(low) - 2, math.log(high) + 2)
        found = optimize.minimize_scalar(lambda s: -self.log_likelihood(mean, s), bounds=bounds, method="bounded")
        return max(math.exp(found.x), self.floor)

    def profile(self, mean: float) -> float:
        return self.log_likelihood(mean, math.log(self.best_sd(mean)))

    def most_likely(self) -> tuple[float, float]:
        """Return the mean and the standard deviation at the maximum of the likelihood (Tobit; Cohen 1959)."""
        center = float(np.mean(self.seen))
        if not self.hidden:
            return center, self.best_sd(center)
        reach = (self.limit - center) + max(self.best_sd(center), self.floor)
        bounds = (center, self.limit + 8 * reach * (1 + self.hidden / len(self.seen)))
        found = optimize.minimize_scalar(lambda m: -self.profile(m), bounds=bounds, method="bounded")
        return float(found.x), self.best_sd(float(found.x))

    def limits(self, t: float) -> tuple[float, float, float]:
        """Return (mean, low, high): where the profile likelihood falls by what a t statistic of `t` costs.

        With e values seen, the drop is e/2·log(1 + t²/(e−1)). Without hidden values this is exactly
        mean ± t·sd/√e; with them it bends to the side where the hidden values may lie.
        """
        mean, sd = self.most_likely()
        seen = len(self.seen)
        drop = seen / 2 * math.log1p(t * t / (seen - 1))
        if not self.hidden:
            half = t * max(sd * math.sqrt(seen / (seen - 1)), self.floor) / math.sqrt(seen)
            return mean, mean - half, mean + half
        target = self.profile(mean) - drop
        step = t * sd / math.sqrt(seen)
        return mean, self._crossing(mean, -step, target), self._crossing(mean, step, target)

    def _crossing(self, mean: float, step: float, target: float) -> float:
        """Return where the profile likelihood falls to `target`, searched from the mean in the direction of `step`."""
        far = mean + step
        for _ in range(60):
            if self.profile(far) < target:
                return float(optimize.brentq(lambda m: self.profile(m) - target, mean, far, xtol=1e-6, rtol=1e-9))
            step *= 2
            far = mean + step
        return math.copysign(math.inf, step)

    def open_limits(self, other: "CensoredSample", level: float) -> tuple[float, float, float]:
        """Return (mean, low, inf) for an arm of which at most one value is seen; the spread is the other arm's.

        If h of n values hide beyond the limit, the chance of hiding is at least q (Clopper & Pearson 1934), and
        the arm's center lies above limit − sd·z(1−q), z by Student's law because sd is the other arm's estimate.
        """
        q = float(stats.beta.ppf((1 - level) / 2, self.hidden, len(self.seen) + 1))
        sd = max(float(np.std(other.seen, ddof=1)), other.floor)
        low = self.limit + sd * min(0.0, float(stats.t.ppf(q, other.dof)))
        return self.limit, low, math.inf


def _arrival_differs(first: CensoredSample, second: CensoredSample, level: float) -> bool:
    """Return whether the arms differ in how many values are seen, by Fisher's exact test.

    The test assumes no distribution. It needs four seeds an arm to show a difference.
    """
    table = [[len(arm.seen), arm.hidden] for arm in (first, second)]
    return bool(stats.fisher_exact(table).pvalue <= 1 - level)


def censored_difference(first: CensoredSample, second: CensoredSample, level: float = LEVEL) -> Interval:
    """Return the mean of `first` minus the mean of `second` with its interval.

    Each arm gets its own limits and its own spread; the two are joined by the square-and-add rule (Zou & Donner
    2008), which is Welch's interval when nothing is hidden. An arm with fewer than two seen values leaves its
    side of the interval open. There the law of the steps cannot be checked (a run may be late, or never arrive),
    so the other side is given only if Fisher's exact test shows that the arms differ; else NOTHING.
    """
    told = [arm for arm in (first, second) if arm.dof >= 1]
    if not told or (len(told) == 1 and not _arrival_differs(first, second, level)):
        return NOTHING
    if len(told) == 2:
        spreads = [max(arm.most_likely()[1], arm.floor) ** 2 / arm.dof for arm in (first, second)]
        t = _quantile(level, satterthwaite((spreads[0], spreads[1]), (first.dof, second.dof)))
    else:
        t = _quantile(level, told[0].dof)
    a, a_low, a_high = first.limits(t) if first.dof >= 1 else first.open_limits(second, level)
    b, b_low, b_high = second.limits(t) if second.dof >= 1 else second.open_limits(first, level)
    return Interval(a - b, a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low))
