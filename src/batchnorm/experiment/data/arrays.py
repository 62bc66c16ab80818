"""NumPy arrays on disk: x.npy beside y.npy, a folder of such pairs as shards, uncompressed .npz files.

They are read with plain bounded reads at an offset and not mapped: the system counts every mapped page that was
read as memory of this process until it needs the memory elsewhere.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...errors import UserError, quote_error
from .readers import check_labels, check_layout
from .sources import (
    SEGMENT_BYTES,
    Block,
    Source,
    check_finite,
    encode_labels,
    even_starts,
    too_large,
)


@dataclass(frozen=True)
class OnDisk:
    """An array inside a file: its values start at `offset`, in C order."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> np.ndarray:
        """Read `count` rows from row `first` on."""
        values = int(np.prod(self.shape[1:], dtype=np.int64)) * count
        try:
            flat = np.fromfile(self.path, self.dtype, values, offset=self.offset + first * self.row_bytes)
        except OSError as error:
            raise UserError(f"cannot be read ({quote_error(error)}), {self.path}, check the file") from error
        if len(flat) < values:
            raise UserError(f"truncated within row {first + count}, {self.path}, write or copy the file again")
        return flat.reshape(count, *self.shape[1:])


class ArraySource(Source):
    """Pairs of arrays (x, y), one after the other."""

    def __init__(self, path: Path, pairs: list[tuple[OnDisk, OnDisk]]) -> None:
        first = pairs[0][0]
        for x, y in pairs:
            check_layout(x, y, x.path)
            if (x.shape[1:], x.dtype) != (first.shape[1:], first.dtype):
                raise UserError(
                    f"samples of shape {x.shape[1:]} and dtype {x.dtype}, {x.path}, "
                    f"store them like {first.path.name}: {first.shape[1:]} and {first.dtype}"
                )
        self._path, self._pairs = path, pairs
        self.name, self.shape, self.dtype = path.name or str(path), first.shape[1:], first.dtype
        ends = np.cumsum([x.shape[0] for x, _ in pairs])
        self._firsts = ends - [x.shape[0] for x, _ in pairs]
        # No segment spans two shards.
        least = max(1, SEGMENT_BYTES // first.row_bytes)
        even = even_starts(int(ends[-1]), least)
        self.starts = np.union1d(even, ends)
        self.nbytes = int(ends[-1]) * first.row_bytes

    def read(self, segment: int) -> Iterator[Block]:
        """Yield the segment as one block."""
        start, end = (int(k) for k in self.starts[segment : segment + 2])
        shard = int(np.searchsorted(self._firsts, start, "right")) - 1
        x, y = self._pairs[shard]
        first = start - int(self._firsts[shard])
        values, targets = x.rows(first, end - start), y.rows(first, end - start)

        def place(index: tuple[int, ...]) -> str:
            return f"x[{', '.join(str(k) for k in (first + index[0], *index[1:]))}], {x.path}"

        check_finite(values, place)
        check_labels(targets, first, y.path)
        labels, codes = encode_labels(targets)
        yield Block(start, values, codes, labels)

    def __reduce__(self) -> tuple[Callable[[Path], ArraySource], tuple[Path]]:
        return _open_again, (self._path.absolute(),)


def _open_again(path: Path) -> ArraySource:
    return ArraySource(path, _pair_in_npz(path) if path.suffix.lower() == ".npz" else _npy_pairs(path))


def open_npy(path: Path) -> ArraySource:
    """Return the source of NAME_x.npy beside NAME_y.npy, or of all such pairs in a folder."""
    return ArraySource(path, _npy_pairs(path))


def open_large_npz(path: Path) -> ArraySource | None:
    """Return the source of an uncompressed .npz file, None for one that is small or damaged and is read at once.

    Raises:
        UserError: it is large and compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError):
        return None  # the reader of small files refuses it and says why
    if not {"x.npy", "y.npy"} <= set(members) or not too_large(members["x.npy"].file_size):
        return None
    for name in ("x.npy", "y.npy"):
        if members[name].compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{name.removesuffix('.npy')} is compressed and too large to unpack in memory, {path}, unpack it once "
                f"with python -m zipfile -e {path.name} {path.stem} and give {path.stem}/x.npy"
            )
    return ArraySource(path, _pair_in_npz(path))


def is_samples(path: Path) -> bool:
    """Return whether a .npy file's name says that it holds samples: it ends in x."""
    return path.suffix.lower() == ".npy" and path.stem.endswith("x") and not path.name.startswith(".")


def _npy_pairs(path: Path) -> list[tuple[OnDisk, OnDisk]]:
    if not path.is_dir() and not is_samples(path):
        raise UserError(
            f"a .npy file whose name does not end in x, {path}, name samples and labels NAME_x.npy and NAME_y.npy"
        )
    files = sorted(p for p in path.iterdir() if is_samples(p)) if path.is_dir() else [path]
    pairs = []
    for x in files:
        y = x.with_name(f"{x.stem[:-1]}y{x.suffix}")
        if not y.is_file():
            raise UserError(f"no labels beside it, {x}, save one label a sample as {y.name}")
        pairs.append((_npy(x), _npy(y)))
    return pairs


def _npy(path: Path) -> OnDisk:
    try:
        with path.open("rb") as file:
            return _header(file, path, path.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot be read ({quote_error(error)}), {path}, check the file") from error


def _pair_in_npz(path: Path) -> list[tuple[OnDisk, OnDisk]]:
    """Return the two arrays in the zip file: an uncompressed member is a .npy file behind a header of the zip."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            found = []
            for name in ("x.npy", "y.npy"):
                info = archive.getinfo(name)
                file.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                file.seek(start)
                found.append(_header(file, path, start + info.file_size))
    except (zipfile.BadZipFile, KeyError, struct.error, OSError) as error:
        raise UserError(f"not a .npz file, {path}, write it with np.savez(FILE, x=samples, y=labels)") from error
    return [(found[0], found[1])]


def _header(file: BinaryIO, path: Path, end: int) -> OnDisk:
    """Read the header of the .npy file that starts here and must not reach beyond `end`."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise UserError(f"not a .npy file ({quote_error(error, 80)}), {path}, write it with np.save") from error
    if dtype.hasobject:
        raise UserError(f"object arrays, {path}, save x and y as numbers or text (dtype other than object)")
    if fortran and len(shape) > 1:
        raise UserError(f"in Fortran order, {path}, save it as np.save(FILE, np.ascontiguousarray(x))")
    array = OnDisk(path, file.tell(), shape, dtype)
    missing = array.offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize - end
    if missing > 0:
        raise UserError(f"truncated, {missing} bytes are missing, {path}, write or copy the file again")
    return array
