"""The order of a streamed set: which rows are held out, and how the others are shuffled.

The shuffle is CorgiPile's (Xu et al. 2022, "In-Database Machine Learning with CorgiPile", SIGMOD): segments in random
order, several of them read side by side, into a buffer from which batches are drawn at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from ...experiment.data import Samples
from ...experiment.streams.source import Block, Source

BUFFER_BYTES = 64 * 2**20
TRAIN, VALIDATION, TEST = range(3)


def parts_of(index: np.ndarray, seed: int, validation: float, test: float) -> np.ndarray:
    """Returns the part of each row (TRAIN, VALIDATION or TEST), by its number and the seed alone.

    A row's hash is a number u, uniform in [0, 1): test where u < `test`, validation where u < `test` + `validation`.
    """
    from pandas.util import hash_array

    # pandas mixes integers as splitmix64 does (Steele, Lea & Flood 2014) from a state that is the integer itself.
    state = index + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    u = (hash_array(state) >> np.uint64(11)) * 2.0**-53
    return np.where(u < test, TEST, np.where(u < test + validation, VALIDATION, TRAIN))


def mixed(source: Source, generator: np.random.Generator) -> Iterator[Block]:
    """Yields all rows of a source, its segments in random order and a few of them in turn."""
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
    """Returns how many rows the shuffling buffer holds: 64 MiB of them, but at least two batches."""
    return max(2 * batch_size, BUFFER_BYTES // row_bytes)


def drawn(
    rows: Iterable[tuple[np.ndarray, np.ndarray]], size: int, capacity: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches (x, y) of `size` rows, drawn at random from a buffer that is kept full while rows last.

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
    """Returns up to so many samples from all over a source, for whoever needs no more; 64 MiB of them at most."""
    row_bytes = int(np.prod(source.shape)) * source.dtype.itemsize
    count = max(1, min(count, source.rows, BUFFER_BYTES // row_bytes))
    generator = np.random.default_rng(seed)
    # Labels as objects: the next segment's may be longer text.
    rows = ((block.x, np.asarray(block.labels, object)[block.y]) for block in mixed(source, generator))
    x, y = next(drawn(rows, count, buffer_rows(row_bytes, count), generator))
    return Samples(source.name, x, y.astype(str))


def _take(
    buffer: tuple[np.ndarray, np.ndarray], held: int, size: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `size` of the held rows, and closes the gaps with the last ones."""
    chosen = generator.choice(held, size, replace=False)
    x, y = buffer[0][chosen], buffer[1][chosen]
    last = held - size
    gaps, stay = chosen[chosen < last], np.setdiff1d(np.arange(last, held), chosen, assume_unique=True)
    for array in buffer:
        array[gaps] = array[stay]
    return x, y
