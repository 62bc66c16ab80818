"""What every kind of streamed data has in common: numbered rows, in segments that can be read by themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from .samples import Samples

if TYPE_CHECKING:
    from typing import Self

# Samples that take more than this once unpacked are streamed. A set in memory takes about five times its size (as read,
# split, standardized in float64), so the largest one takes about 1.5 GB.
WHOLE_BYTES = 256 * 2**20
# Segments are read in random order, each at once: smaller ones mix better, larger ones are read faster.
SEGMENT_BYTES = 128 * 2**10
MOST_SEGMENTS = 2**16


@dataclass(frozen=True)
class Block:
    """Rows in order: `x` (b, *shape) as stored, `y` (b,) numbers into `labels`; `first` is the first row's number."""

    first: int
    x: np.ndarray
    y: np.ndarray
    labels: list[str]

    @property
    def index(self) -> np.ndarray:
        """Return the rows' numbers, (b,) uint64."""
        return np.arange(self.first, self.first + len(self.y), dtype=np.uint64)


class Source(ABC):
    """Rows that are read again in every pass. A source knows where they are and does not hold them.

    Attributes:
        name: what the report calls it.
        shape, dtype: of one sample as stored.
        starts: each segment's first row, and the number of rows at the end.
        nbytes: of all samples once unpacked.
        at_once: how many segments may be read side by side, which mixes them, without taking too much memory.
        function: the user's ``pkg.mod:function`` that the rows come from, if they do.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    starts: np.ndarray
    nbytes: int
    at_once: int = 16
    function: str | None = None

    @abstractmethod
    def read(self, segment: int) -> Iterator[Block]:
        """Yield a segment's rows in order.

        Raises:
            UserError: what cannot be read or is no finite number, naming the file and the row.
        """

    @abstractmethod
    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        """Return what makes this source again in another process: a function and its arguments, never the rows."""

    @property
    def rows(self) -> int:
        """Return the number of samples."""
        return int(self.starts[-1])

    @property
    def is_large(self) -> bool:
        """Return whether the samples are too large to be held in memory."""
        return too_large(self.nbytes)

    def whole(self) -> Samples:
        """Return all rows at once, for a set that is small."""
        blocks = [block for segment in range(len(self.starts) - 1) for block in self.read(segment)]
        y = [np.asarray(block.labels)[block.y] for block in blocks]
        return Samples(self.name, np.concatenate([block.x for block in blocks]), np.concatenate(y))


def too_large(nbytes: int) -> bool:
    """Return whether samples of so many bytes are to be streamed."""
    return nbytes > WHOLE_BYTES


def even_starts(rows: int, least: int) -> np.ndarray:
    """Return the starts of segments of equal length: `least` rows, or more where there would be too many segments."""
    length = max(1, least, -(-rows // MOST_SEGMENTS))
    return np.append(np.arange(0, rows, length, dtype=np.int64), rows)


def encode_labels(y: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the different labels as text, and the number of each sample's; 3.0 is the label 3."""
    values, codes = np.unique(y, return_inverse=True)
    return [label_text(value) for value in values], codes.reshape(-1)


def label_text(value: Any) -> str:
    whole = isinstance(value, (float, np.floating)) and value.is_integer() and abs(float(value)) < 2**53
    return str(int(value)) if whole else str(value)


def check_finite(x: np.ndarray, place: Callable[[tuple[int, ...]], str]) -> None:
    """Refuse a block with NaN or infinity; `place` gives the words for an index into the block."""
    if x.dtype.kind != "f" or np.isfinite(x).all():
        return
    where = tuple(int(k) for k in np.argwhere(~np.isfinite(x))[0])
    what = "an empty or NaN value" if np.isnan(x[where]) else "an infinite value"
    raise UserError(f"{what} at {place(where)}, fill it in or leave the sample out")
