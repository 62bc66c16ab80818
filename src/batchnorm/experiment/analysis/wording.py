"""The claims in plain words, as the report's cards and the terminal show them. The verdict is decided elsewhere."""

import math

from .intervals import Interval
from .metric import ACCURACY, Metric


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _digits(value: float, ratio: bool = False) -> int:
    """Return how many decimals to show; a ratio near 1 gets two, so that it does not round to 1."""
    if abs(value) >= 99.5:
        return 0
    return 2 if abs(value) < 0.995 or (ratio and abs(value) < 1.995) else 1


def _number(value: float, ratio: bool = False) -> str:
    return f"{value:.{_digits(value, ratio)}f}".replace("-", "−")


def _range(low: float, high: float, ratio: bool = False) -> str:
    ends = (_number(low, ratio), _number(high, ratio))
    return f"{ends[0]}–{ends[1]}" if low >= 0 else f"{ends[0]} to {ends[1]}"


def _interval(low: float, high: float, ratio: bool = False) -> str:
    if math.isinf(high) or math.isinf(low):
        side = f"over {_number(low, ratio)}" if math.isinf(high) else f"under {_number(high, ratio)}"
        return f"95 % interval {side}" if not (math.isinf(high) and math.isinf(low)) else "95 % interval open"
    return f"95 % interval {_range(low, high, ratio)}"


def _effect(interval: Interval, null: float) -> int:
    return 1 if interval.low > null else -1 if interval.high < null else 0


def convergence(ratio: Interval, target: str, arms: tuple[str, str], hidden: tuple[int, int], budget: int) -> str:
    effect = _effect(ratio, 1)
    inverse = Interval(1 / ratio.estimate, 1 / ratio.high, 1 / ratio.low if ratio.low > 0 else math.inf)
    shown = inverse if effect < 0 else ratio
    size = f"{_number(shown.estimate, True)} times"
    # An arm of which fewer than two runs reach the target has no mean; the budget is taken for it.
    if math.isinf(shown.high):
        size = f"at least {size}"
    interval = _interval(shown.low, shown.high, True)
    if effect > 0:
        words = f"reaches {target} in {size} fewer steps, {interval}"
    elif effect < 0:
        words = f"needs {size} more steps to reach {target}, {interval}"
    else:
        words = f"no difference shown in the steps to {target}: a ratio of {_number(ratio.estimate, True)}, {interval}"
    return words + (f"; {_missed(arms, hidden, budget)}" if any(hidden) else "")


def too_few_arrivals(target: str, arms: tuple[str, str], hidden: tuple[int, int], n: int, budget: int) -> str:
    return f"too few of the {n} runs an arm reach {target} to tell; {_missed(arms, hidden, budget)}"


def _missed(arms: tuple[str, str], hidden: tuple[int, int], budget: int) -> str:
    counts = [f"{count} of {arm}" for arm, count in zip(arms, hidden, strict=True) if count]
    return f"never there in {budget} steps: {', '.join(counts)}"


def _difference(interval: Interval, more: str, less: str, same: str, unit: str, means: str) -> str:
    effect = _effect(interval, 0)
    if effect == 0:
        sign = "+" if interval.estimate > 0 else ""
        size = f"{sign}{_number(interval.estimate)}{unit}"
        return f"{same}: {size} {means}, {_interval(interval.low, interval.high)}"
    low, high = sorted((effect * interval.low, effect * interval.high))
    words = (more if effect > 0 else less).format(f"{_number(abs(interval.estimate))}{unit}")
    return f"{words} {means}, {_interval(low, high)}"


def _against(compared: float, baseline: float) -> str:
    return f"({_number(compared)} against {_number(baseline)})"


def learning_rate(interval: Interval, baseline: float, compared: float, cut: int, seeds: int) -> str:
    words = _difference(
        interval,
        "works over {} more of learning rate",
        "works over {} less of learning rate",
        "no difference shown in the range of learning rates that work",
        " decades",
        _against(compared, baseline),
    )
    return words + (f"; the grid's end cuts the range short for {cut} of {seeds} seeds" if cut else "")


def spread(interval: Interval, baseline: float, compared: float, factor: str, metric: Metric = ACCURACY) -> str:
    return _difference(
        interval,
        f"{metric.name} varies {{}} more over the {factor} grid",
        f"{metric.name} varies {{}} less over the {factor} grid",
        f"no difference shown in how far {metric.name} varies over the {factor} grid",
        metric.after,
        _against(compared, baseline),
    )


def generalization(
    interval: Interval, baseline: float, compared: float, metric: Metric = ACCURACY, part: str = "test"
) -> str:
    """Return the words of a difference in the metric.

    Args:
        baseline, compared: mean scores.
        part: where the metric was taken.
    """
    what = f"{part} {metric.name}"
    if not metric.larger_is_better:  # the text speaks of the metric itself, of which less is better
        interval = Interval(-interval.estimate, -interval.high, -interval.low)
    return _difference(
        interval,
        f"{what} {{}} higher",
        f"{what} {{}} lower",
        f"no difference shown in {what}",
        metric.after,
        f"({metric.words(compared)} against {metric.words(baseline)})",
    )


def drift(ratio: Interval, baseline: float, compared: float, lost: int) -> str:
    effect = _effect(ratio, 1)
    size, interval = _number(ratio.estimate, True), _interval(ratio.low, ratio.high, True)
    means = f"({_number(compared)} against {_number(baseline)} spreads)"
    if effect:
        words = f"the percentiles of a hidden unit wander {size} times as far {means}, {interval}"
    else:
        words = f"no difference shown in how far a hidden unit's percentiles wander: {size} times {means}, {interval}"
    return words + (f"; {lost} runs have no percentiles that move and are left out" if lost else "")


def level_accuracy(interval: Interval, baseline: float, compared: float, name: str, against: str) -> str:
    return _difference(
        interval,
        f"test accuracy {{}} higher {name} than {against}",
        f"test accuracy {{}} lower {name} than {against}",
        f"no difference shown in test accuracy {name} against {against}",
        " points",
        f"({percent(compared / 100)} against {percent(baseline / 100)})",
    )


def level_ratio(ratio: Interval, unit: str, target: str, name: str, against: str, hidden: tuple[int, int]) -> str:
    """Return the words of a ratio between two levels.

    Args:
        hidden: how many runs never reach the target, at `against` and at `name`.
    """
    size, interval = f"{_number(ratio.estimate, True)} times", _interval(ratio.low, ratio.high, True)
    if _effect(ratio, 1):
        words = f"{name} takes {size} the {unit} of {against} to {target}, {interval}"
    else:
        words = f"no difference shown in the {unit} to {target}: {name} takes {size} those of {against}, {interval}"
    late = [f"{count} at {level}" for count, level in zip(hidden, (against, name), strict=True) if count]
    return words + (f"; never there: {', '.join(late)}" if late else "")
