"""Samples with their labels, as a data source gives them: neither split nor standardized yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from .dataset import Dataset, ResidentDataset
from .splits import order_labels, split, standardize


class SampleSet(ABC):
    """What a data source opens to.

    Whether samples are held in memory or streamed is decided once, when the source is opened. Everything after that
    calls these methods and does not ask again.
    """

    @abstractmethod
    def some(self, count: int, seed: int) -> Samples:
        """Return samples for a caller who needs no more than `count`; samples in memory are returned as they are."""

    @abstractmethod
    def dataset(self, base_seed: int, progress: TextIO | None) -> Dataset:
        """Return the samples split and standardized.

        Args:
            base_seed: fixes which samples fall into which part.
            progress: where to show how far a pass over the samples is; None = nowhere.

        Raises:
            UserError: whatever is wrong with the samples.
        """


@dataclass(frozen=True)
class Samples(SampleSet):
    """Samples in memory: `x` (samples, *shape), any real dtype; `y` text labels, one a sample."""

    name: str
    x: np.ndarray
    y: np.ndarray

    def some(self, count: int, seed: int) -> Samples:
        """Return all samples."""
        return self

    def dataset(self, base_seed: int, progress: TextIO | None) -> ResidentDataset:
        """Return the samples split and standardized."""
        values, y = np.unique(self.y, return_inverse=True)
        labels, rank = order_labels([str(value) for value in values], np.bincount(y), self.name)
        numbers = rank[y]
        parts = split(numbers, base_seed)
        x = standardize({part: self.x[index] for part, index in parts.items()}, self.name)
        return ResidentDataset(self.name, x, {part: numbers[index] for part, index in parts.items()}, labels)
