"""A torch.utils.data Dataset, or any iterable of (x, y), from a user's function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ...errors import UserError, quote_error
from ...factories import find_factory
from .sources import Block, Source, check_finite, encode_labels, even_starts

_SAMPLES_A_SEGMENT = 16
_SAMPLES_A_BLOCK = 64


class FactorySource(Source):
    """Samples of the data set that `pkg.mod:function` returns.

    One with a length and numbered samples is read in random order. An iterable is read from its beginning in every
    pass, and asked of the function anew each time, so that a generator will do; it is counted first.
    """

    def __init__(self, name: str, rows: int | None = None) -> None:
        self.name = self.function = name
        self._made = self._make()
        self._numbered = _is_numbered(self._made)
        first = self._first()
        self.shape, self.dtype = first.shape, first.dtype
        if rows is None:
            rows = len(self._made) if self._numbered else sum(1 for _ in self._iterate())
        if rows == 0:
            raise UserError(f"no samples, study(data={name}), return a data set that has some")
        self.starts = even_starts(rows, _SAMPLES_A_SEGMENT) if self._numbered else np.array([0, rows])
        self.nbytes = rows * first.nbytes

    def _make(self) -> Any:
        factory = find_factory(self.name, "study(data=…)", "the data")
        try:
            made = factory()
        except Exception as error:
            raise UserError(
                f"the function raises ({quote_error(error)}), study(data={self.name}), correct it"
            ) from error
        if isinstance(made, (DataLoader, torch.nn.Module, str)) or not (_is_numbered(made) or _is_iterable(made)):
            raise UserError(
                f"the function returns {type(made).__name__}, study(data={self.name}), "
                "return a torch.utils.data.Dataset, or an iterable, of samples (x, y)"
            )
        return made

    def _first(self) -> np.ndarray:
        try:
            raw = self._made[0] if self._numbered and len(self._made) else next(iter(self._iterate()), None)
        except UserError:
            raise
        except Exception as error:
            raise self._raised(0, error) from error
        if raw is None:
            raise UserError(f"no samples, study(data={self.name}), return a data set that has some")
        return self._split(raw, 0)[0]

    def _iterate(self) -> Iterator[Any]:
        """Yield the samples of a new iterable in its order."""
        count = 0
        try:
            for raw in self._make():
                yield raw
                count += 1
        except UserError:
            raise
        except Exception as error:
            raise self._raised(count, error) from error

    def _raised(self, number: int, error: Exception) -> UserError:
        return UserError(
            f"sample {number} raises ({quote_error(error)}), study(data={self.name}), correct the data set"
        )

    def read(self, segment: int) -> Iterator[Block]:
        """Yield the segment's samples, 64 at a time."""
        start, end = (int(k) for k in self.starts[segment : segment + 2])
        first, held = start, []
        for raw in self._numbered_samples(start, end) if self._numbered else self._iterate():
            held.append(raw)
            if len(held) == _SAMPLES_A_BLOCK:
                yield self._block(first, held)
                first, held = first + len(held), []
        if held:
            yield self._block(first, held)
        if first + len(held) != end:
            raise UserError(
                f"{first + len(held) - start} samples where there were {end - start} before, study(data={self.name}), "
                "return the same samples each time"
            )

    def _numbered_samples(self, start: int, end: int) -> Iterator[Any]:
        for k in range(start, end):
            try:
                yield self._made[k]
            except Exception as error:
                raise self._raised(k, error) from error

    def _block(self, first: int, raw: list[Any]) -> Block:
        pairs = [self._split(sample, first + k) for k, sample in enumerate(raw)]
        for k, (x, _) in enumerate(pairs):
            if x.shape != self.shape or not np.can_cast(x.dtype, self.dtype):
                raise UserError(
                    f"sample {first + k} is {x.dtype} of shape {x.shape} and not {self.dtype} of shape {self.shape}, "
                    f"study(data={self.name}), give all samples one dtype and shape"
                )
        x = np.stack([x for x, _ in pairs]).astype(self.dtype, copy=False)
        check_finite(x, lambda index: f"sample {first + index[0]}, study(data={self.name})")
        labels, y = encode_labels(np.asarray([y for _, y in pairs]))
        return Block(first, x, y, labels)

    def _split(self, raw: Any, number: int) -> tuple[np.ndarray, Any]:
        """Return x as an array and y as a number or text."""
        if not isinstance(raw, (tuple, list)) or len(raw) != 2:
            raise UserError(
                f"sample {number} is no pair but {type(raw).__name__}, study(data={self.name}), "
                "return samples (x, label)"
            )
        x, y = (value.detach().cpu() if isinstance(value, torch.Tensor) else value for value in raw)
        x = x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x
        try:
            array, label = np.atleast_1d(np.asarray(x)), np.asarray(y)
        except Exception as error:  # ragged lists, foreign objects
            raise self._raised(number, error) from error
        if array.dtype.kind not in "biuf" or array.size == 0:
            raise UserError(
                f"x of sample {number} is {array.dtype} of shape {array.shape}, study(data={self.name}), "
                "return real numbers"
            )
        if label.size != 1 or label.dtype.kind not in "biufU":
            raise UserError(
                f"the label of sample {number} is {str(y)[:40]!r}, study(data={self.name}), return one class"
            )
        value = label.reshape(-1)[0].item()
        if value != value or value in (float("inf"), float("-inf")):
            raise UserError(f"label {number} is NaN or infinite, study(data={self.name}), label every sample")
        return array, value

    def __reduce__(self) -> tuple[type[FactorySource], tuple[str, int]]:
        return FactorySource, (self.name, self.rows)


def _is_numbered(made: Any) -> bool:
    return hasattr(made, "__getitem__") and hasattr(made, "__len__") and not isinstance(made, (IterableDataset, dict))


def _is_iterable(made: Any) -> bool:
    return isinstance(made, Iterable) and not isinstance(made, dict)
