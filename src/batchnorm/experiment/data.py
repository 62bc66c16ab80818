"""From a name or a path to three standardized parts: load, check, split, standardize.

What is too large to be held whole is streamed instead (`streams/`). The split is stratified and fixed by the study's
base seed, so every arm and every seed sees the same samples in the same parts. Means and standard deviations come from
the training part alone: the other two parts must not leak into what the network sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PARTS = ("train", "validation", "test")
HELD_OUT = PARTS[1:]
# 60/20/20, but never more than these many samples held out: each run evaluates some forty times, and the
# standard error of an accuracy near 95 % is already under half a point at 2,000 samples.
VALIDATION_SHARE, VALIDATION_MOST = 0.2, 2_000
TEST_SHARE, TEST_MOST = 0.2, 10_000
STREAM_FILE = "stream.json"


@dataclass(frozen=True)
class Samples:
    """What a reader returns: `x` (samples, *shape), any real dtype; `y` text labels, one a sample."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Samples split and standardized: `x[part]` float32 (n, *shape), `y[part]` int64 class numbers (n,)."""

    name: str
    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    labels: list[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one sample."""
        return tuple(self.x["train"].shape[1:])

    @property
    def classes(self) -> int:
        """Returns the number of different labels."""
        return len(self.labels)

    @property
    def example(self) -> Tensor:
        """Returns two samples, to show a network what it will be fed."""
        import torch

        return torch.from_numpy(self.x["train"][:2])

    def size(self, part: str) -> int:
        """Returns the number of samples of a part."""
        return len(self.y[part])

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields training batches (x, y) of one size for ever, each pass in a new order.

        A pass's remainder is left out rather than made a smaller batch, whose statistics would be of another kind.
        """
        import torch

        x, y = torch.from_numpy(self.x["train"]), torch.from_numpy(self.y["train"])
        generator = torch.Generator().manual_seed(seed)
        size = min(batch_size, len(y))
        while True:
            order = torch.randperm(len(y), generator=generator)
            for k in range(len(y) // size):
                index = order[k * size : (k + 1) * size]
                yield x[index], y[index]

    def chance(self, part: str) -> float:
        """Returns the accuracy on `part` of always answering its most frequent class."""
        import numpy as np

        return float(np.bincount(self.y[part]).max() / len(self.y[part]))

    def fingerprint(self) -> str:
        """Returns a digest of every value, by which a resumed study knows that its data are the same."""
        digest = hashlib.sha256()
        for part in PARTS:
            digest.update(str(self.x[part].shape).encode())
            digest.update(self.x[part].tobytes())
            digest.update(self.y[part].tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """Returns the `data` entry of summary.json."""
        sizes = {part: self.size(part) for part in PARTS}
        return {
            "name": self.name,
            "samples": sum(sizes.values()),
            **sizes,
            "shape": list(self.shape),
            "classes": self.classes,
            "labels": self.labels,
        }

    def save(self, folder: Path) -> None:
        """Writes the arrays for worker processes, which map them into memory instead of receiving copies."""
        import numpy as np

        for part in self.x:
            np.save(folder / f"x_{part}.npy", self.x[part])
            np.save(folder / f"y_{part}.npy", self.y[part])

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Returns what `save` wrote, mapped copy-on-write (torch wants writable memory; nobody writes)."""
        if (folder / STREAM_FILE).exists():
            from ..experiment.streams.dataset import StreamedDataset

            return StreamedDataset.open(folder)
        y = map_arrays(folder, "y", PARTS)
        return cls(str(folder), map_arrays(folder, "x", PARTS), y, [str(k) for k in range(int(y["train"].max()) + 1)])


def map_arrays(folder: Path, stem: str, parts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the arrays that `Dataset.save` wrote for these parts."""
    import numpy as np

    return {p: np.load(folder / f"{stem}_{p}.npy", mmap_mode="c", allow_pickle=False) for p in parts}


def load(source: str, base_seed: int = 0, progress: TextIO | None = None) -> Dataset:
    """Returns the data set that `--data` names, checked, split and standardized.

    Args:
        source: whatever `--data` takes (`readers.find`).
        base_seed: fixes which samples fall into which part.
        progress: where to show how far the first pass over a streamed set is; None = nowhere.

    Raises:
        UserError: whatever is wrong with the source, naming it, the place in it and what to do.
    """
    from ..experiment.readers import find

    samples = find(source)
    if not isinstance(samples, Samples):
        from ..experiment.streams.survey import survey

        return survey(samples, base_seed, progress)
    labels, y = _number_labels(samples)
    parts = split(y, base_seed)
    x = standardize({part: samples.x[index] for part, index in parts.items()}, samples.name)
    return Dataset(samples.name, x, {part: y[index] for part, index in parts.items()}, labels)


def _number_labels(samples: Samples) -> tuple[list[str], np.ndarray]:
    import numpy as np

    values, y = np.unique(samples.y, return_inverse=True)
    labels, rank = order_labels([str(value) for value in values], np.bincount(y), samples.name)
    return labels, rank[y]


def order_labels(values: list[str], counts: np.ndarray, name: str) -> tuple[list[str], np.ndarray]:
    """Returns the labels in order and, for each of `values` (which are sorted as text), its number.

    Raises:
        UserError: labels that no network can be trained and tested on: none, a single one, one with few samples.
    """
    import numpy as np

    if not values:
        raise UserError(f"no samples, {name}, give a data set with at least 3 samples of each class")
    if len(values) < 2:
        raise UserError(f"a single class {values[0]!r}, {name}, give data with at least two different labels")
    if counts.min() < 3:
        raise UserError(
            f"class {values[counts.argmin()]!r} has {counts.min()} sample(s), {name}, "
            "give each class at least 3 (one each for training, validation and test) or leave it out"
        )
    try:  # 2 before 10 when every label is a number
        order = np.argsort([float(value) for value in values], kind="stable")
    except ValueError:
        order = np.arange(len(values))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return [values[k] for k in order], rank.astype(np.int64)


def split(y: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Returns the sample numbers of each part, every class in every part in (nearly) the same share.

    Args:
        y: class numbers (n,), each class at least three times.
        seed: decides which samples go where.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    validation = min(VALIDATION_SHARE, VALIDATION_MOST / len(y))
    test = min(TEST_SHARE, TEST_MOST / len(y))
    picked: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for k in range(int(y.max()) + 1):
        members = generator.permutation(np.flatnonzero(y == k))
        n_validation = max(1, round(validation * len(members)))
        n_test = max(1, round(test * len(members)))
        picked["validation"].append(members[:n_validation])
        picked["test"].append(members[n_validation : n_validation + n_test])
        picked["train"].append(members[n_validation + n_test :])
    return {part: generator.permutation(np.concatenate(members)) for part, members in picked.items()}


def standardize(x: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Returns every part as float32 (x − mean)/sd, mean and sd those of the training part.

    One mean and sd a feature for flat samples, one a channel for (C, H, W) and deeper, one in all for (H, W):
    single pixels at an image's rim hardly vary, and dividing by their own sd would turn noise into outliers.
    What does not vary in the training part is only centered.

    Raises:
        UserError: values too large for their variance to be represented.
    """
    import numpy as np

    train = x["train"]
    axes = {2: (0,), 3: (0, 1, 2)}.get(train.ndim, (0, *range(2, train.ndim)))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = train.mean(axis=axes, dtype=np.float64, keepdims=True)
        sd = np.sqrt(np.mean(np.square(train - mean), axis=axes, dtype=np.float64, keepdims=True))
    sd = usable_spread(mean, sd, name)
    return {part: ((values - mean) / sd).astype(np.float32) for part, values in x.items()}


def usable_spread(mean: np.ndarray, sd: np.ndarray, name: str) -> np.ndarray:
    """Returns what to divide by: `sd`, but 1 for what does not vary.

    Raises:
        UserError: values too large for their variance to be represented.
    """
    import numpy as np

    if not (np.isfinite(mean).all() and np.isfinite(sd).all()):
        raise UserError(f"values too large to standardize, {name}, scale the features down")
    # A constant feature's sd is rounding error, not spread: a few ulps of its mean.
    sd = np.where(sd <= 1e-12 * np.abs(mean), 1.0, sd)
    return np.where(sd == 0, 1.0, sd)
