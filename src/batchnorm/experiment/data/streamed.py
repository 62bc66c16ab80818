"""A data set whose training part is streamed; the held-out parts, whose size is bounded, are in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .dataset import Dataset
from .shuffle import buffer_rows, drawn, mixed
from .sources import Block, Source
from .splits import TRAIN, parts_of

# A batch takes memory for its activations and gradients too, so a larger one than this is refused.
LARGEST_BATCH = 256 * 2**20


@dataclass(frozen=True)
class StreamFacts:
    """What the first pass over a source found: all that a run needs besides the rows.

    `mean` and `sd` are the training part's, `training` its number of rows, `shares` the held-out parts' (validation,
    test), `order` what the pass saw of how random the batches are.
    """

    name: str
    digest: str
    split_seed: int
    shares: tuple[float, float]
    training: int
    mean: list[Any]
    sd: list[Any]
    labels: list[str]
    order: dict[str, Any]


@dataclass(frozen=True)
class StreamedDataset(Dataset):
    """The training part is read from `source`.

    `x` and `y` hold the validation and the test part, `held_rows` the row numbers of these samples, ascending, and
    `held_labels` their labels.
    """

    source: Source = field(repr=False)
    facts: StreamFacts = field(repr=False)
    held_rows: np.ndarray = field(repr=False)
    held_labels: np.ndarray = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def example(self) -> Tensor:
        return torch.from_numpy(self.x["validation"][:2])

    @property
    def function(self) -> str | None:
        return self.source.function

    def size(self, part: str) -> int:
        return self.facts.training if part == "train" else len(self.y[part])

    def fingerprint(self) -> str:
        return self.facts.digest

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "streamed": True, "order": self.facts.order}

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training batches (x, y) of one size for ever, each pass in an order of its own.

        Raises:
            UserError: a batch too large to hold, or what cannot be read any more.
        """
        size = min(batch_size, self.size("train"))
        row_bytes = int(np.prod(self.shape)) * self.source.dtype.itemsize
        if size * row_bytes > LARGEST_BATCH:
            raise UserError(
                f"a batch of {size} samples takes {size * row_bytes / 2**20:.0f} MiB, study(batch_size={batch_size}), "
                "give a smaller one: the data are streamed because they are too large to hold"
            )
        mean, sd = np.asarray(self.facts.mean), np.asarray(self.facts.sd)
        capacity = buffer_rows(row_bytes, size)
        epoch = 0
        while True:
            generator = np.random.default_rng([seed, epoch])
            rows = (self._training_rows(block) for block in mixed(self.source, generator))
            for x, y in drawn(rows, size, capacity, generator):
                yield torch.from_numpy(((x - mean) / sd).astype(np.float32)), torch.from_numpy(y)
            epoch += 1

    def _training_rows(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        y = np.asarray([self._numbers.get(label, -1) for label in block.labels], np.int64)[block.y]
        training = parts_of(block.index, self.facts.split_seed, *self.facts.shares) == TRAIN
        first, last = np.searchsorted(self.held_rows, [block.first, block.first + len(y)])
        if y.min() < 0 or not np.array_equal(y[~training], self.held_labels[first:last]):
            raise UserError(
                f"rows {block.first} to {block.first + len(y) - 1} have other labels than before, "
                f"study(data={self.name}), give the same samples in the same order each time (the study shuffles them)"
            )
        return block.x[training], y[training]

    @property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}
