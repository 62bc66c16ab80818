"""What the runs are judged by: its name, which way is better, and how its values are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A metric and its score, of which more is better and a hundredth is a small step.

        score = ±(value − origin) / length

    Accuracies are their own scores. All estimators work on scores; claims and texts speak of values.

    Attributes:
        name: as the texts speak of it.
        larger_is_better: the sign of the score.
        fraction: whether values lie in [0, 1] and are shown in percent, their differences in points.
        origin, length: of the score; see `run_table.metric_of` for metrics that are no fractions.
    """

    name: str = "accuracy"
    larger_is_better: bool = True
    fraction: bool = True
    origin: float = 0.0
    length: float = 1.0

    @property
    def sign(self) -> int:
        """Return 1 where more is better, −1 where less is."""
        return 1 if self.larger_is_better else -1

    @property
    def scale(self) -> float:
        """Return what a difference of one in score is in the unit of the claims."""
        return 100.0 if self.fraction else self.length

    @property
    def unit(self) -> str:
        """Return the unit of a difference: percentage points, or the metric's own."""
        return "points" if self.fraction else self.name

    @property
    def after(self) -> str:
        """Return what follows a difference in a text."""
        return " points" if self.fraction else ""

    def score(self, values: Any) -> Any:
        """Return the scores of values, a number or an array of them."""
        return self.sign * (values - self.origin) / self.length

    def value(self, scores: Any) -> Any:
        """Return the values of scores."""
        return self.origin + self.sign * self.length * scores

    def words(self, score: float) -> str:
        """Return the value of a score as a text shows it."""
        value = self.value(score)
        return f"{100 * value:.1f} %" if self.fraction else f"{value:.3g}".replace("-", "−")

    def to_json(self) -> dict[str, str | bool]:
        """Return the `metric` entry of summary.json."""
        return {"name": self.name, "larger_is_better": self.larger_is_better, "fraction": self.fraction}


ACCURACY = Metric()
