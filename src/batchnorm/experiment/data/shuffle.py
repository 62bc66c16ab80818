"""The order of a streamed set: how its rows are shuffled.

The shuffle is CorgiPile's (Xu et al. 2022, "In-Database Machine Learning with CorgiPile", SIGMOD): segments in random
order, several of them read side by side, into a buffer from which batches are drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from .samples import Samples
from .sources import Block, Source

BUFFER_BYTES = 64 * 2**20


def mixed(source: Source, generator: np.random.Generator) -> Iterator[Block]:
    """Yield all rows of a source: its segments in random order, a few of them in turn."""
    waiting = iter(generator.permutation(len(source.starts) - 1).tolist())
    reading = [source.read(segment) for segment in islice(waiting, source.at_once)]
    turn = 0
    while reading:
        turn %= len(reading)
        block = next(reading[turn], None)
        if block is not None:
            yield block
            turn += 1
            continue
        following = next(waiting, None)
        if following is None:
            reading.pop(turn)
        else:
            reading[turn] = source.read(following)


def buffer_rows(row_bytes: int, batch_size: int) -> int:
    """Return how many rows the shuffling buffer holds: 64 MiB of them, but at least two batches."""
    return max(2 * batch_size, BUFFER_BYTES // row_bytes)


def drawn(
    rows: Iterable[tuple[np.ndarray, np.ndarray]], size: int, capacity: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches (x, y) of `size` rows, drawn at random from a buffer that is refilled while there are rows.

    The last rows, too few for a batch, are left out.
    """
    buffer: tuple[np.ndarray, np.ndarray] | None = None
    held = 0
    for x, y in rows:
        if buffer is None:
            buffer = np.empty((capacity, *x.shape[1:]), x.dtype), np.empty(capacity, y.dtype)
        taken = 0
        while taken < len(y):
            count = min(capacity - held, len(y) - taken)
            for array, new in zip(buffer, (x, y), strict=True):
                array[held : held + count] = new[taken : taken + count]
            held, taken = held + count, taken + count
            if held == capacity:
                yield _take(buffer, held, size, generator)
                held -= size
    while buffer is not None and held >= size:
        yield _take(buffer, held, size, generator)
        held -= size


def some_of(source: Source, count: int, seed: int) -> Samples:
    """Return up to `count` samples from all parts of a source, at most 64 MiB of them."""
    row_bytes = int(np.prod(source.shape)) * source.dtype.itemsize
    count = max(1, min(count, source.rows, BUFFER_BYTES // row_bytes))
    generator = np.random.default_rng(seed)
    # Labels as objects: those of the next segment may be longer text.
    rows = ((block.x, np.asarray(block.labels, object)[block.y]) for block in mixed(source, generator))
    x, y = next(drawn(rows, count, buffer_rows(row_bytes, count), generator))
    return Samples(source.name, x, y.astype(str))


def _take(
    buffer: tuple[np.ndarray, np.ndarray], held: int, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return `size` random rows of the buffer; the last rows are moved into the gaps."""
    chosen = generator.choice(held, size, replace=False)
    x, y = buffer[0][chosen], buffer[1][chosen]
    last = held - size
    gaps, stay = chosen[chosen < last], np.setdiff1d(np.arange(last, held), chosen, assume_unique=True)
    for array in buffer:
        array[gaps] = array[stay]
    return x, y
