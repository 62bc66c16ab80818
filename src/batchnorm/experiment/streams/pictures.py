"""A folder of images, one subfolder a class, decoded a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...experiment.data import Samples
from ...experiment.images import files_by_class, measure_images, read_image, read_images
from ...experiment.streams.source import Block, Source, even_starts

_IMAGES_A_SEGMENT = 4


class ImageSource(Source):
    """Images brought to one size. Holds the files' names, and nothing of the pixels."""

    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, shape: tuple[int, int, int] | None = None, nbytes: int = 0) -> None:
        self._folder, self.name = folder, folder.name or str(folder)
        files = files_by_class(folder)
        self._labels = list(files)
        self._files = [path for paths in files.values() for path in paths]
        self._ends = np.cumsum([len(paths) for paths in files.values()])
        self.shape, self.nbytes = (shape, nbytes) if shape else measure_images(self._files)
        self.starts = even_starts(len(self._files), _IMAGES_A_SEGMENT)

    def read(self, segment: int) -> Iterator[Block]:
        """Yields the segment's images as one block."""
        start, end = (int(k) for k in self.starts[segment : segment + 2])
        x = np.stack([read_image(path, self.shape) for path in self._files[start:end]])
        y = np.searchsorted(self._ends, np.arange(start, end), "right")
        yield Block(start, x, y, self._labels)

    def whole(self) -> Samples:
        """Returns all images, each of them decoded once."""
        return read_images(self._folder)

    def describe(self) -> dict[str, Any]:
        """Returns the folder, and the size to which the images are brought."""
        return {"path": str(self._folder.absolute()), "shape": list(self.shape), "nbytes": self.nbytes}

    @classmethod
    def reopen(cls, described: dict[str, Any]) -> ImageSource:
        """Lists the folder again; the images' sizes are known."""
        return cls(Path(described["path"]), tuple(described["shape"]), described["nbytes"])
