"""The one pass over a streamed set before any training: moments, classes, held-out samples, digest, order.

The rows are read in the shuffled order of a training pass, so that the same pass shows how random that order is.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import torch

from ...errors import UserError
from ...statistics.batch_order import likely_ratio, variance_ratio
from ...statistics.measured import Measured, moments
from ...statistics.pool import Pool
from ..output.progress import ReadingView
from .samples import Samples, SampleSet
from .shuffle import buffer_rows, drawn, mixed, some_of
from .sources import Block, Source
from .splits import TEST, TRAIN, VALIDATION, held_out_shares, order_labels, parts_of, usable_spread
from .streamed import StreamedDataset, StreamFacts

# Every run holds the held-out parts in memory: each takes at most this many bytes (as float32).
HELD_BYTES = 128 * 2**20
MOST_LABELS = 10_000
# The order is judged by batches of the study's default size, spread over the pass, and by some of the features.
_ORDER_BATCH, _ORDER_BATCHES, _ORDER_FEATURES = 60, 200, 256


def survey(source: Source, seed: int, progress: TextIO | None) -> StreamedDataset:
    """Return the data set, ready to be streamed, after one pass over all its rows.

    Args:
        source: where the rows are.
        seed: fixes the split.
        progress: where to show how far the pass is; None = nowhere.

    Raises:
        UserError: whatever is wrong with the rows, naming the file and the row.
    """
    passed = _Pass(source, seed)
    order = _OrderWatch(source.rows)
    generator = np.random.default_rng(seed)
    with ReadingView(source.name, source.rows, progress) as view:
        rows = passed.training_rows(mixed(source, generator), view)
        row_bytes = int(np.prod(source.shape)) * source.dtype.itemsize
        for x, _ in drawn(rows, _ORDER_BATCH, buffer_rows(row_bytes, _ORDER_BATCH), generator):
            order.watch(x)
    data = passed.finish(order.to_json())
    if not order.random:
        line = (
            f"the order of {source.name} is not random: the means of batches vary {order.ratio:.1f} times as much as "
            "those of randomly drawn ones (BN206), shuffle the samples on disk once or store them in smaller row groups"
        )
        if progress is None:
            warnings.warn(line, stacklevel=4)  # the line that called `load`
        else:
            print(f"warning: {line}", file=progress, flush=True)
    return data


class _Pass:
    """What is gathered from the rows while they are read."""

    def __init__(self, source: Source, seed: int) -> None:
        self._source, self._seed = source, seed
        most = HELD_BYTES // (4 * int(np.prod(source.shape)))
        self._shares = held_out_shares(source.rows, most)
        channels = 1 if len(source.shape) == 2 else source.shape[0]
        self._pool = Pool(channels)
        self._digest = hashlib.sha256()
        self._numbers: dict[str, int] = {}  # in the order of their first appearance
        self._counts = np.zeros((3, 0), np.int64)
        self._held: list[tuple[int, np.ndarray, int, int]] = []  # row, x, label, part

    def training_rows(self, blocks: Iterator[Block], view: ReadingView) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the training rows (x, y) of the blocks; gather from all rows."""
        for block in blocks:
            y = self._number(block)
            parts = parts_of(block.index, self._seed, *self._shares)
            np.add.at(self._counts, (parts, y), 1)
            self._digest.update(f"{block.first}{block.labels}".encode())
            self._digest.update(np.ascontiguousarray(block.x).data)
            self._digest.update(np.ascontiguousarray(block.y).data)
            self._held += [
                (block.first + int(k), block.x[k].copy(), int(y[k]), int(parts[k])) for k in np.flatnonzero(parts)
            ]
            x = block.x[parts == TRAIN]
            if len(x):
                self._pool.add_values(_by_channel(x))
            view.advance(len(y))
            yield x, y[parts == TRAIN]

    def _number(self, block: Block) -> np.ndarray:
        """Return the label numbers of the rows; a new label gets a new number."""
        met = np.bincount(block.y, minlength=len(block.labels)) > 0
        numbers = np.full(len(block.labels), -1, np.int64)
        for k in np.flatnonzero(met):
            numbers[k] = self._numbers.setdefault(block.labels[k], len(self._numbers))
        if len(self._numbers) > MOST_LABELS:
            raise UserError(
                f"more than {MOST_LABELS} different labels, {self._source.name}, give classes and not a quantity"
            )
        grown = len(self._numbers) - self._counts.shape[1]
        self._counts = np.pad(self._counts, ((0, 0), (0, grown)))
        return numbers[block.y]

    def finish(self, order: dict[str, object]) -> StreamedDataset:
        """Return the data set: labels numbered in their order, held-out parts standardized and in the rows' order."""
        name = self._source.name
        met = sorted(self._numbers)
        by_text = np.asarray([self._numbers[label] for label in met], np.int64)
        counts = self._counts[:, by_text]
        labels, rank = order_labels(met, counts.sum(0), name)
        for label, count in zip(met, counts[TRAIN], strict=True):
            if count == 0:
                raise UserError(f"class {label!r} fell to the held-out parts alone, {name}, give it more samples")
        if min(counts[VALIDATION].sum(), counts[TEST].sum()) < 2:
            raise UserError(f"samples too large and too few to hold some out, {name}, give more or smaller samples")
        number = np.empty(len(met), np.int64)
        number[by_text] = rank
        mean, sd = self._moments()
        held = sorted(self._held, key=lambda sample: sample[0])
        x, y = {}, {}
        for part, code in (("validation", VALIDATION), ("test", TEST)):
            of_part = [sample for sample in held if sample[3] == code]
            x[part] = np.stack([((values - mean[0]) / sd[0]).astype(np.float32) for _, values, _, _ in of_part])
            y[part] = number[[label for _, _, label, _ in of_part]]
        facts = StreamFacts(
            name, self._digest.hexdigest()[:16], self._seed, self._shares, int(counts[TRAIN].sum()),
            mean.tolist(), sd.tolist(), labels, order,
        )  # fmt: skip
        rows = np.asarray([row for row, _, _, _ in held], np.int64)
        return StreamedDataset(
            name, x, y, labels, self._source, facts, rows, number[[label for _, _, label, _ in held]]
        )

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and sd in the shape that standardizes a batch (1, …)."""
        axes = len(self._source.shape)
        shape = (1, -1, *[1] * (axes - 1)) if axes != 2 else (1, 1, 1)
        mean, m2 = self._pool.mean.numpy(), self._pool.m2.numpy()
        with np.errstate(invalid="ignore"):
            sd = np.sqrt(m2 / self._pool.count)
        return mean.reshape(shape), usable_spread(mean, sd, self._source.name).reshape(shape)


def _by_channel(x: np.ndarray) -> torch.Tensor:
    """Return samples as (n, channels, \\*), in floating point without loss; one mean standardizes one channel."""
    small = x.dtype.kind == "b" or (x.dtype.itemsize <= 2) or x.dtype == np.float32
    tensor = torch.from_numpy(x.astype(np.float32 if small else np.float64, copy=False))
    return tensor.flatten(1).unsqueeze(1) if x.ndim == 3 else tensor


class _OrderWatch:
    """Looks at batches as they are drawn, as the doctor's rule BN206 looks at the inputs of a layer."""

    def __init__(self, rows: int) -> None:
        self._every = max(1, rows // _ORDER_BATCH // _ORDER_BATCHES)
        self._passed = 0
        self._seen = Measured()
        self._scale: torch.Tensor | None = None

    def watch(self, x: np.ndarray) -> None:
        """Add a batch; only some of them, spread over the pass, are looked at."""
        if self._passed % self._every == 0:
            values = _by_channel(x).double()
            values = values[:, np.unique(np.linspace(0, values.shape[1] - 1, _ORDER_FEATURES).astype(int))]
            if self._scale is None:  # BN206 takes a channel of tiny variance for constant
                spread = values.transpose(0, 1).flatten(1).std(1)
                self._scale = torch.where(spread > 0, spread, 1.0).reshape(1, -1, *[1] * (values.dim() - 2))
            values = values / self._scale
            self._seen.add(values, *moments(values))
        self._passed += 1

    @property
    def ratio(self) -> float:
        """Return the variance of the batch means over that of randomly drawn batches."""
        return variance_ratio(self._seen)

    @property
    def random(self) -> bool:
        """Return whether chance explains how much the batch means differ."""
        return self.ratio <= likely_ratio(len(self._seen.batch_means))

    def to_json(self) -> dict[str, object]:
        """Return the `order` entry of summary.json."""
        watched = len(self._seen.batch_means)
        return {"variance_ratio": float(f"{self.ratio:.4g}"), "batches": watched, "random": self.random}


@dataclass(frozen=True)
class StreamedSamples(SampleSet):
    """Samples that stay where they are and are read again in every pass."""

    source: Source

    def some(self, count: int, seed: int) -> Samples:
        """Return up to `count` samples from all over the source."""
        return some_of(self.source, count, seed)

    def dataset(self, base_seed: int, progress: TextIO | None) -> StreamedDataset:
        """Return the data set after one pass over all rows."""
        return survey(self.source, base_seed, progress)
