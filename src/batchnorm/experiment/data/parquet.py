"""Parquet: a file, or a folder of shards with the same columns, read by pyarrow; a folder `label=cat` is a column."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, quote_error
from .columns import Place, is_list, labels_of, samples_of, value_dtype
from .sources import Block, Source, check_finite

SUFFIXES = (".parquet", ".pq")
_BLOCK_BYTES = 2**20
# Memory for the row groups that are open at once: of each, one page a column is unpacked, usually 1 MiB.
_OPEN_BYTES, _PAGE_BYTES = 32 * 2**20, 2**20
_READ_AHEAD = 2 * 2**20


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder and its subfolders in order, without those hidden by `.` or `_`."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(p for p in found if not any(part[0] in "._" for part in p.relative_to(folder).parts))


class ParquetSource(Source):
    """Row groups of Parquet files. The label is the column `label`, else the last; all others are features."""

    def __init__(self, path: Path) -> None:
        if _without_pyarrow():
            raise UserError(
                "pyarrow is not installed, this Python, install it for Parquet with pip install 'batchnorm[stream]'"
            )
        import pyarrow.parquet

        self._path, self.name = path, path.name or str(path)
        # The metadata of a file with many row groups are large and slow to parse: those of the last files are kept.
        self._end_of = functools.lru_cache(maxsize=8)(pyarrow.parquet.read_metadata)
        self._files = parquet_files(path) if path.is_dir() else [path]
        self._folders = _folder_columns(path, self._files)
        schema, groups = _check_shards(self._files)
        names = [*schema.names, *self._folders[0]]
        self._label = "label" if "label" in names else names[-1]
        self._features = [name for name in names if name != self._label]
        self.dtype = _check_columns(schema, self._folders[0], self._features, self._label, self._files[0])
        self._columns = len(names)
        # (file, row group, the group's first row in its file), without empty groups
        self._places = [
            (file, group, int(end) - rows[group])
            for file, rows in enumerate(groups)
            for group, end in enumerate(np.cumsum(rows))
            if rows[group]
        ]
        if not self._places:
            raise UserError(f"no rows, {path}, give files with one row a sample")
        self.starts = np.concatenate([[0], np.cumsum([groups[file][group] for file, group, _ in self._places])])
        self._settle_block()

    def _settle_block(self) -> None:
        """Take the shape of a sample from the first row, and from the shape how much to read at a time."""
        self._block, self.shape = 1, ()
        row = next(self.read(0)).x
        self.shape = row.shape[1:]
        if row.size == 0:
            raise UserError(f"samples without values, {self._files[0]}, give at least one number a sample")
        self._block = max(1, _BLOCK_BYTES // row.nbytes)
        self.nbytes = self.rows * row.nbytes
        largest_group = int(np.diff(self.starts).max()) * row.nbytes
        self.at_once = int(np.clip(_OPEN_BYTES // min(largest_group, self._columns * _PAGE_BYTES), 1, 16))

    def read(self, segment: int) -> Iterator[Block]:
        """Yield a row group, a megabyte at a time."""
        file, group, inside = self._places[segment]
        path, first = self._files[file], int(self.starts[segment])
        with _named(path), _open(path, self._columns, self._end_of(path)) as parquet:
            for batch in parquet.iter_batches(self._block, row_groups=[group], use_threads=False):

                def place(row: int, inside: int = inside) -> str:
                    return f"row {inside + row + 1}, {path}"

                x = self._samples(batch, self._folders[file], place)
                labels, y = self._labels(batch, self._folders[file], place)
                yield Block(first, x, y, labels)
                first, inside = first + len(y), inside + len(y)

    def _samples(self, batch: Any, folder: dict[str, Any], place: Place) -> np.ndarray:
        x = samples_of(batch, self._features, folder, self.dtype, place)
        if self.shape and x.shape[1:] != self.shape:
            raise UserError(
                f"a sample of shape {x.shape[1:]} and not {self.shape} at {place(0)}, give all the same shape"
            )
        check_finite(x, lambda index: f"{self._column_at(index)}{place(index[0])}")
        return x

    def _column_at(self, index: tuple[int, ...]) -> str:
        return f"column {self._features[index[1] if len(self._features) > 1 else 0]!r}, "

    def _labels(self, batch: Any, folder: dict[str, Any], place: Place) -> tuple[list[str], np.ndarray]:
        if self._label in folder:
            return [str(folder[self._label])], np.zeros(batch.num_rows, np.int64)
        return labels_of(batch.column(self._label), self._label, place)

    def __reduce__(self) -> tuple[type[ParquetSource], tuple[Path]]:
        return ParquetSource, (self._path.absolute(),)


def _without_pyarrow() -> bool:
    try:
        importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        return True
    return False


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises on a damaged file into a UserError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise UserError(
            f"not a whole Parquet file ({quote_error(error, 100)}), {path}, write or copy the file again"
        ) from error


@contextmanager
def _open(path: Path, columns: int = 1, end: Any = None) -> Iterator[Any]:
    import pyarrow.parquet

    # Without a buffer size pyarrow reads a complete row group at once.
    ahead = max(2**12, _READ_AHEAD // max(1, columns))
    with pyarrow.parquet.ParquetFile(path, metadata=end, buffer_size=ahead, pre_buffer=False) as parquet:
        yield parquet


def _check_shards(files: list[Path]) -> tuple[Any, list[list[int]]]:
    """Return the columns that all files have, and the rows of each file's row groups."""
    first, groups = None, []
    for path in files:
        with _named(path), _open(path) as parquet:
            schema = parquet.schema_arrow.remove_metadata()
            groups.append([parquet.metadata.row_group(k).num_rows for k in range(parquet.metadata.num_row_groups)])
        first = schema if first is None else first
        _check_same(schema, first, path, files[0])
    return first, groups


def _check_same(schema: Any, wanted: Any, path: Path, model: Path) -> None:
    types, expected = (dict(zip(s.names, s.types, strict=True)) for s in (schema, wanted))
    if len(types) < len(schema.names):
        twice = next(name for name in schema.names if schema.names.count(name) > 1)
        raise UserError(f"two columns are named {twice!r}, {path}, give each its own name")
    for name in [*expected, *types]:
        if name not in types or name not in expected:
            what = "no column" if name not in types else "a column"
            raise UserError(f"{what} {name!r}, {path}, give it the columns of {model.name}")
        if types[name] != expected[name]:
            raise UserError(f"column {name!r} is {types[name]}, {path}, store it as in {model.name}: {expected[name]}")


def _check_columns(schema: Any, folder: dict[str, Any], features: list[str], label: str, path: Path) -> np.dtype:
    """Return the common dtype of the features; refuse columns that would silently train on the wrong thing."""
    if not features:
        raise UserError(f"only one column {label!r}, {path}, give feature columns and a column label")
    for name in (*features, label):
        if name.startswith("__index_level_"):
            raise UserError(
                f"column {name!r} is a row index of pandas (which would tell the labels?), {path}, "
                "write it with index=False"
            )
    dtypes = []
    for name in features:
        kind = np.result_type(folder[name]) if name in folder else value_dtype(schema.field(name).type)
        if kind is None or kind.kind not in "biuf":
            stored = type(folder[name]).__name__ if name in folder else schema.field(name).type
            raise UserError(
                f"column {name!r} is of type {stored}, {path}, encode it as numbers or remove it "
                f"(the label is {label!r})"
            )
        if name not in folder and is_list(schema.field(name).type) and len(features) > 1:
            raise UserError(
                f"column {name!r} holds lists beside other features, {path}, give one column of lists or single numbers"
            )
        dtypes.append(kind)
    return np.result_type(*dtypes)


def _folder_columns(path: Path, files: list[Path]) -> list[dict[str, Any]]:
    """Return, for each file, the columns that its folders' names hold, as in label=cat/part-0.parquet."""
    if not path.is_dir() or not any("=" in part for file in files for part in file.relative_to(path).parts[:-1]):
        return [{} for _ in files]
    import pyarrow.dataset

    with _named(files[0]):
        dataset = pyarrow.dataset.dataset(
            [str(file.absolute()) for file in files],
            format="parquet",
            partitioning="hive",
            partition_base_dir=str(path.absolute()),
        )
        keys = {
            Path(part.path): pyarrow.dataset.get_partition_keys(part.partition_expression)
            for part in dataset.get_fragments()
        }
    names = [name for name in dataset.schema.names if name in keys[files[0].absolute()]]
    for file in files:
        if set(keys[file.absolute()]) != set(names):
            raise UserError(f"its folders name other columns, {file}, give it the folders of {files[0]}")
    return [{name: keys[file.absolute()][name] for name in names} for file in files]
