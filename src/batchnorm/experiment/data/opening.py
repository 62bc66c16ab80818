"""The one opener: from what `study(data=…)` names to samples and data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from ...errors import UserError, quote_error
from .arrays import is_samples, open_large_npz, open_npy
from .dataset import Dataset
from .from_function import FactorySource
from .images import ImageSource
from .parquet import SUFFIXES, ParquetSource, parquet_files
from .readers import read_csv, read_digits, read_npz, read_openml
from .samples import SampleSet
from .sources import Source
from .survey import StreamedSamples


def load(source: str, base_seed: int = 0, progress: TextIO | None = None) -> Dataset:
    """Return the data set that `source` names, checked, split and standardized.

    Args:
        source: whatever `find` takes.
        base_seed: fixes which samples fall into which part.
        progress: where to show how far the first pass over a streamed set is; None = nowhere.

    Raises:
        UserError: whatever is wrong with the source, naming it, the place in it and what to do.
    """
    return find(source).dataset(base_seed, progress)


def find(source: str) -> SampleSet:
    """Return the samples of a data source; those that are too large to be held are streamed.

    Args:
        source: ``digits``, ``openml:NAME``, FILE.npz, FILE.csv, NAME_x.npy, FILE.parquet, a folder of images, .parquet
            or NAME_x.npy files, or ``pkg.mod:function``.

    Raises:
        UserError: the source is missing, unreadable or holds what no network can be trained on.
    """
    if source == "digits":
        return read_digits()
    if source.startswith("openml:"):
        return read_openml(source)
    path = Path(source)
    try:
        if not path.exists() and ":" not in source:
            raise UserError(
                f"no such file or folder, {source}, give the path of a .npz, .npy, .csv or .parquet file or a folder "
                "(or digits, or openml:NAME, or pkg.mod:function)"
            )
        opened = open_source(source)
        if opened is not None:
            return StreamedSamples(opened) if opened.is_large else opened.whole()
        return {".npz": read_npz, ".csv": read_csv}[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(
            f"cannot be read ({quote_error(error)}), {source}, check the file and its permissions"
        ) from error


def open_source(source: str) -> Source | None:
    """Return the source of a path or of ``pkg.mod:function``; None for a .csv or .npz file that is read at once.

    Raises:
        UserError: no kind of file that is known, or what the kind's own opening refuses.
    """
    path = Path(source)
    if not path.exists():
        return FactorySource(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        if parquet_files(path):
            return ParquetSource(path)
        return open_npy(path) if any(is_samples(file) for file in path.iterdir()) else ImageSource(path)
    if suffix in SUFFIXES:
        return ParquetSource(path)
    if suffix == ".npy":
        return open_npy(path)
    if suffix == ".npz":
        return open_large_npz(path)
    if suffix != ".csv":
        raise UserError(
            f"unknown kind of file, {source}, give a .npz, .npy, .csv or .parquet file or a folder of images by class"
        )
    return None
