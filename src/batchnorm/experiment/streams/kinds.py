"""The kinds of source: from what `--data` says, or from a saved description, to the source that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError
from ...experiment.streams.arrays import ArraySource, is_samples, open_large_npz, open_npy
from ...experiment.streams.factory import FactorySource
from ...experiment.streams.parquet import SUFFIXES, ParquetSource, parquet_files
from ...experiment.streams.pictures import ImageSource
from ...experiment.streams.source import Source

_KINDS: dict[str, type[Source]] = {
    kind.__name__: kind for kind in (ArraySource, FactorySource, ParquetSource, ImageSource)
}


def open_source(source: str) -> Source | None:
    """Returns the source of a path or of ``pkg.mod:function``; None for a .csv or .npz that is to be read whole.

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


def describe(source: Source) -> dict[str, Any]:
    """Returns, as JSON types, what `reopen` needs."""
    return {"kind": type(source).__name__, **source.describe()}


def reopen(described: dict[str, Any]) -> Source:
    """Returns a source again, in this process or another."""
    return _KINDS[described["kind"]].reopen(described)
