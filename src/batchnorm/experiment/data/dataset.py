"""Samples split and standardized, as the training runs use them; held in memory here, streamed in `streamed.py`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .splits import PARTS


@dataclass(frozen=True)
class Dataset(ABC):
    """Three standardized parts: `x[part]` float32 (n, *shape), `y[part]` int64 class numbers (n,).

    `x` and `y` always hold the validation and the test part. Only the types know where the training part lies: ask
    `batches` for it.
    """

    name: str
    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    labels: list[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one sample."""

    @property
    @abstractmethod
    def example(self) -> Tensor:
        """Return two samples, to show a network what it will be fed."""

    @abstractmethod
    def size(self, part: str) -> int:
        """Return the number of samples of a part."""

    @abstractmethod
    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training batches (x, y) of one size for ever, each pass in a new order.

        A pass's remainder is left out rather than made a smaller batch, whose statistics would be of another kind.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of every value, by which a resumed study knows that its data are the same."""

    @property
    def function(self) -> str | None:
        """Return the ``pkg.mod:function`` that every process which reads the data must be able to import, if any."""
        return None

    @property
    def classes(self) -> int:
        """Return the number of different labels."""
        return len(self.labels)

    def chance(self, part: str) -> float:
        """Return the accuracy on a held-out part of always answering its most frequent class."""
        return float(np.bincount(self.y[part]).max() / len(self.y[part]))

    def describe(self) -> dict[str, object]:
        """Return the `data` entry of summary.json."""
        sizes = {part: self.size(part) for part in PARTS}
        return {
            "name": self.name,
            "samples": sum(sizes.values()),
            **sizes,
            "shape": list(self.shape),
            "classes": self.classes,
            "labels": self.labels,
        }


@dataclass(frozen=True)
class ResidentDataset(Dataset):
    """All three parts are held in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x["train"].shape[1:])

    @property
    def example(self) -> Tensor:
        return torch.from_numpy(self.x["train"][:2])

    def size(self, part: str) -> int:
        return len(self.y[part])

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.from_numpy(self.x["train"]), torch.from_numpy(self.y["train"])
        generator = torch.Generator().manual_seed(seed)
        size = min(batch_size, len(y))
        while True:
            order = torch.randperm(len(y), generator=generator)
            for k in range(len(y) // size):
                index = order[k * size : (k + 1) * size]
                yield x[index], y[index]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in PARTS:
            digest.update(str(self.x[part].shape).encode())
            digest.update(self.x[part].tobytes())
            digest.update(self.y[part].tobytes())
        return digest.hexdigest()[:16]
