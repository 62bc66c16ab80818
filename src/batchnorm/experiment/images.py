"""A folder of images, one subfolder a class, read into one array."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.errors import UserError, quote_error
from batchnorm.experiment.data import Samples

if TYPE_CHECKING:
    import numpy as np

# Beyond this a study of some two hundred trainings on a CPU would take days.
MOST_PIXELS_A_SIDE = 64
_GREY_MODES = {"1", "L", "LA"}
# Grey modes deeper than 8 bits, which Pillow would clip at 255 on the way to "L": the value that means white.
_DEEP_MODES = {"I": 65535, "I;16": 65535, "I;16B": 65535, "F": 1}


def read_images(folder: Path) -> Samples:
    """Returns every image of a folder as float32 (n, C, H, W), labelled by its subfolder's name.

    All are brought to one size: the median height and width, at most 64 pixels a side. C is 1 when every image
    is grey, else 3. Hidden files are passed over.

    Raises:
        UserError: no subfolders, an empty one, or a file that is no image.
    """
    import numpy as np

    files = _files_by_class(folder)
    images = [(label, _open(path)) for label, paths in files.items() for path in paths]
    channels = max(3 if image.ndim == 3 else 1 for _, image in images)
    height, width = (
        min(MOST_PIXELS_A_SIDE, max(1, int(np.median([image.shape[axis] for _, image in images])))) for axis in (0, 1)
    )
    x = np.stack([_resize(image, height, width, channels) for _, image in images])
    return Samples(folder.name or str(folder), x, np.asarray([label for label, _ in images]))


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(f"no subfolders, {folder}, put the images into one subfolder a class")
    files: dict[str, list[Path]] = {}
    for path in classes:
        files[path.name] = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
        if not files[path.name]:
            raise UserError(f"no images, {path}, put the images of this class into it or remove the folder")
    return files


def _open(path: Path) -> np.ndarray:
    """Returns one image as float32 (H, W), or (H, W, 3) when it has colours; 0…1 for the usual 8 bits."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # A camera's orientation flag, and palettes: pixels as a viewer would show them.
                upright = ImageOps.exif_transpose(image)
                white = _DEEP_MODES.get(upright.mode, 255)
                mode = "F" if upright.mode in _DEEP_MODES else "L" if upright.mode in _GREY_MODES else "RGB"
                pixels = np.asarray(upright.convert(mode), dtype=np.float32)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        raise UserError(f"not a readable image ({quote_error(error, 80)}), {path}, replace or remove it") from error
    if not np.isfinite(pixels).all():
        raise UserError(f"NaN or infinite pixels, {path}, replace or remove it")
    return pixels / np.float32(white)


def _resize(image: np.ndarray, height: int, width: int, channels: int) -> np.ndarray:
    """Returns the image as (channels, height, width), resampled when its size differs."""
    import numpy as np
    from PIL import Image

    planes = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    if planes.shape[1:] != (height, width):
        resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in planes]
        planes = np.stack([np.asarray(plane, dtype=np.float32) for plane in resized])
    return np.broadcast_to(planes, (channels, height, width)) if len(planes) != channels else planes
