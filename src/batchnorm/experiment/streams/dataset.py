"""A data set whose training part stays where it lies; the held-out parts, which are bounded, are held as usual."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...experiment.data import HELD_OUT, STREAM_FILE, Dataset, map_arrays
from ...experiment.streams.kinds import describe, reopen
from ...experiment.streams.order import TRAIN, buffer_rows, drawn, mixed, parts_of
from ...experiment.streams.source import Block, Source

# A batch is held with its gradients and activations: what is larger has to be trained in smaller batches.
_LARGEST_BATCH = 256 * 2**20


@dataclass(frozen=True)
class Facts:
    """What one pass over a source has found: all that a run needs besides the rows, as JSON types.

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
    """`x` and `y` hold the validation and the test part; `held_rows` are these samples' row numbers, ascending, and
    `held_labels` their labels."""

    source: Source = field(repr=False)
    facts: Facts = field(repr=False)
    held_rows: np.ndarray = field(repr=False)
    held_labels: np.ndarray = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one sample."""
        return self.source.shape

    @property
    def example(self) -> Tensor:
        """Returns two samples, to show a network what it will be fed."""
        return torch.from_numpy(self.x["validation"][:2])

    def size(self, part: str) -> int:
        """Returns the number of samples of a part."""
        return self.facts.training if part == "train" else super().size(part)

    def fingerprint(self) -> str:
        """Returns the digest that the first pass took of every value."""
        return self.facts.digest

    def describe(self) -> dict[str, object]:
        """Returns the `data` entry of summary.json."""
        return {**super().describe(), "streamed": True, "order": self.facts.order}

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields training batches (x, y) of one size for ever, each pass in an order of its own.

        Raises:
            UserError: a batch too large to hold, or what cannot be read any more.
        """
        size = min(batch_size, self.size("train"))
        row_bytes = int(np.prod(self.shape)) * self.source.dtype.itemsize
        if size * row_bytes > _LARGEST_BATCH:
            raise UserError(
                f"a batch of {size} samples takes {size * row_bytes / 2**20:.0f} MiB, --batch-size {batch_size}, "
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
                f"rows {block.first} to {block.first + len(y) - 1} have other labels than before, --data {self.name}, "
                "give the same samples in the same order each time (the study shuffles them)"
            )
        return block.x[training], y[training]

    @property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def save(self, folder: Path) -> None:
        """Writes the held-out arrays for worker processes, and where and how to read the others."""
        super().save(folder)
        np.savez(folder / "held.npz", rows=self.held_rows, labels=self.held_labels)
        described = {"source": describe(self.source), "facts": vars(self.facts)}
        (folder / STREAM_FILE).write_text(json.dumps(described), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> StreamedDataset:
        """Returns what `save` wrote."""
        described = json.loads((folder / STREAM_FILE).read_text(encoding="utf-8"))
        facts = Facts(**described["facts"])
        with np.load(folder / "held.npz", allow_pickle=False) as held:
            rows, labels = held["rows"], held["labels"]
        x, y = (map_arrays(folder, stem, HELD_OUT) for stem in "xy")
        return cls(facts.name, x, y, facts.labels, reopen(described["source"]), facts, rows, labels)
