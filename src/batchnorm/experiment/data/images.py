"""A folder of images, one subfolder a class, decoded a few at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import UserError, quote_error
from .sources import Block, Source, even_starts

_IMAGES_A_SEGMENT = 4
# With larger images a study of some two hundred training runs on a CPU would take days.
MOST_PIXELS_A_SIDE = 64
_GREY_MODES = {"1", "L", "LA"}
# Gray modes of more than 8 bits, and their value for white. Pillow would clip them at 255 when it converts to "L".
_DEEP_MODES = {"I": 65535, "I;16": 65535, "I;16B": 65535, "F": 1}
# EXIF's tag for the orientation of the camera, and the values that mean a quarter turn.
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


class ImageSource(Source):
    """Images brought to one size, labeled by the name of their subfolder. Holds the names of the files only."""

    dtype = np.dtype(np.float32)

    def __init__(self, folder: Path, shape: tuple[int, ...] | None = None, nbytes: int = 0) -> None:
        self._folder, self.name = folder, folder.name or str(folder)
        files = files_by_class(folder)
        self._labels = list(files)
        self._files = [path for paths in files.values() for path in paths]
        self._ends = np.cumsum([len(paths) for paths in files.values()])
        self.shape, self.nbytes = (shape, nbytes) if shape else measure_images(self._files)
        self.starts = even_starts(len(self._files), _IMAGES_A_SEGMENT)

    def read(self, segment: int) -> Iterator[Block]:
        """Yield the segment's images as one block."""
        start, end = (int(k) for k in self.starts[segment : segment + 2])
        x = np.stack([_resize(_open(path), self.shape) for path in self._files[start:end]])
        y = np.searchsorted(self._ends, np.arange(start, end), "right")
        yield Block(start, x, y, self._labels)

    def __reduce__(self) -> tuple[type[ImageSource], tuple[Path, tuple[int, ...], int]]:
        return ImageSource, (self._folder.absolute(), self.shape, self.nbytes)


def measure_images(files: list[Path]) -> tuple[tuple[int, int, int], int]:
    """Return the shape (C, H, W) of all images once they are read, and the bytes that all take before they are resized.

    The shape is the median height and width, at most 64 pixels a side. C is 1 when every image is gray, else 3.

    Reads only the headers of the files.
    """
    shapes = [_shape_of(path) for path in files]
    channels = max(3 if len(shape) == 3 else 1 for shape in shapes)
    height, width = (
        min(MOST_PIXELS_A_SIDE, max(1, int(np.median([shape[axis] for shape in shapes])))) for axis in (0, 1)
    )
    return (channels, height, width), sum(4 * math.prod(shape) for shape in shapes)


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each subfolder in order, without hidden ones.

    Raises:
        UserError: no subfolders, or an empty one.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(
            f"no subfolders, {folder}, put images into one subfolder a class, or .parquet or NAME_x.npy files there"
        )
    files: dict[str, list[Path]] = {}
    for path in classes:
        files[path.name] = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        if not files[path.name]:
            raise UserError(f"no images, {path}, put the images of this class into it or remove the folder")
    return files


def _shape_of(path: Path) -> tuple[int, ...]:
    """Return the shape of what `_open` would return."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about unusual but readable files, once an image
            with Image.open(path) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
                width, height = image.size[::-1] if turned else image.size
                colored = image.mode not in _GREY_MODES and image.mode not in _DEEP_MODES
    except Exception as error:  # Pillow's plugins raise exceptions of many types on damaged files
        raise _unreadable(path, error) from error
    return (height, width, 3) if colored else (height, width)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"not a readable image ({quote_error(error, 80)}), {path}, replace or remove it")


def _open(path: Path) -> np.ndarray:
    """Return one image as float32 (H, W), or (H, W, 3) when it has colors; 0…1 for the usual 8 bits."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about unusual but readable files, once an image
            with Image.open(path) as image:
                # Pixels as a viewer shows them: the orientation flag and palettes are applied.
                upright = ImageOps.exif_transpose(image)
                white = _DEEP_MODES.get(upright.mode, 255)
                mode = "F" if upright.mode in _DEEP_MODES else "L" if upright.mode in _GREY_MODES else "RGB"
                pixels = np.asarray(upright.convert(mode), dtype=np.float32)
    except Exception as error:  # Pillow's plugins raise exceptions of many types on damaged files
        raise _unreadable(path, error) from error
    if not np.isfinite(pixels).all():
        raise UserError(f"NaN or infinite pixels, {path}, replace or remove it")
    return pixels / np.float32(white)


def _resize(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the image as (channels, height, width), resampled when its size differs."""
    from PIL import Image

    channels, height, width = shape
    planes = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    if planes.shape[1:] != (height, width):
        resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in planes]
        planes = np.stack([np.asarray(plane, dtype=np.float32) for plane in resized])
    return np.broadcast_to(planes, (channels, height, width)) if len(planes) != channels else planes
