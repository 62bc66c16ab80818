"""A folder of images, one subfolder a class: read into one array, or one by one."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, quote_error
from ..experiment.data import Samples

if TYPE_CHECKING:
    import numpy as np

# Beyond this a study of some two hundred trainings on a CPU would take days.
MOST_PIXELS_A_SIDE = 64
_GREY_MODES = {"1", "L", "LA"}
# Gray modes deeper than 8 bits, which Pillow would clip at 255 on the way to "L": the value that means white.
_DEEP_MODES = {"I": 65535, "I;16": 65535, "I;16B": 65535, "F": 1}
# EXIF's tag for how a camera was held, and its values for a quarter turn.
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


def read_images(folder: Path) -> Samples:
    """Returns every image of a folder as float32 (n, C, H, W), labeled by its subfolder's name.

    All are brought to one size: the median height and width, at most 64 pixels a side. C is 1 when every image
    is gray, else 3. Hidden files are passed over.

    Raises:
        UserError: no subfolders, an empty one, or a file that is no image.
    """
    import numpy as np

    files = files_by_class(folder)
    images = [(label, _open(path)) for label, paths in files.items() for path in paths]
    shape = _common_shape([image.shape for _, image in images])
    x = np.stack([_resize(image, shape) for _, image in images])
    return Samples(folder.name or str(folder), x, np.asarray([label for label, _ in images]))


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Returns one image as float32 of this shape (C, H, W)."""
    return _resize(_open(path), shape)


def measure_images(files: list[Path]) -> tuple[tuple[int, int, int], int]:
    """Returns the shape to which `read_images` brings these files, and the bytes that it takes to decode them all.

    Reads what stands before the pixels only.
    """
    shapes = [_shape_of(path) for path in files]
    return _common_shape(shapes), sum(4 * math.prod(shape) for shape in shapes)


def _common_shape(shapes: list[tuple[int, ...]]) -> tuple[int, int, int]:
    import numpy as np

    height, width = (
        min(MOST_PIXELS_A_SIDE, max(1, int(np.median([shape[axis] for shape in shapes])))) for axis in (0, 1)
    )
    return max(3 if len(shape) == 3 else 1 for shape in shapes), height, width


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of each subfolder in order, hidden ones passed over.

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
    """Returns the shape of what `_open` would return."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on odd but readable files, once an image
            with Image.open(path) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
                width, height = image.size[::-1] if turned else image.size
                colored = image.mode not in _GREY_MODES and image.mode not in _DEEP_MODES
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise _unreadable(path, error) from error
    return (height, width, 3) if colored else (height, width)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"not a readable image ({quote_error(error, 80)}), {path}, replace or remove it")


def _open(path: Path) -> np.ndarray:
    """Returns one image as float32 (H, W), or (H, W, 3) when it has colors; 0…1 for the usual 8 bits."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on odd but readable files, once an image
            with Image.open(path) as image:
                # A camera's orientation flag, and palettes: pixels as a viewer would show them.
                upright = ImageOps.exif_transpose(image)
                white = _DEEP_MODES.get(upright.mode, 255)
                mode = "F" if upright.mode in _DEEP_MODES else "L" if upright.mode in _GREY_MODES else "RGB"
                pixels = np.asarray(upright.convert(mode), dtype=np.float32)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise _unreadable(path, error) from error
    if not np.isfinite(pixels).all():
        raise UserError(f"NaN or infinite pixels, {path}, replace or remove it")
    return pixels / np.float32(white)


def _resize(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the image as (channels, height, width), resampled when its size differs."""
    import numpy as np
    from PIL import Image

    channels, height, width = shape
    planes = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    if planes.shape[1:] != (height, width):
        resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in planes]
        planes = np.stack([np.asarray(plane, dtype=np.float32) for plane in resized])
    return np.broadcast_to(planes, (channels, height, width)) if len(planes) != channels else planes
