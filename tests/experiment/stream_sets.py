"""One small set of samples, stored in every form that can be streamed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset, IterableDataset

ROWS = 600
Y = np.random.default_rng(1).permutation(np.arange(ROWS) % 3)
# The first feature is the row's number, by which a drawn sample is known again; the others are far from standardized.
X = np.column_stack([np.arange(ROWS), np.random.default_rng(2).normal(1e4, 3, (ROWS, 3)) + Y[:, None]])


def table(rows: slice = slice(None)) -> pa.Table:
    return pa.table({**{f"f{k}": X[rows, k] for k in range(X.shape[1])}, "label": Y[rows]})


def npy(folder: Path) -> str:
    np.save(folder / "a_x.npy", X)
    np.save(folder / "a_y.npy", Y)
    return str(folder / "a_x.npy")


def npy_shards(folder: Path) -> str:
    for k, rows in enumerate((slice(0, 250), slice(250, 251), slice(251, ROWS))):
        np.save(folder / f"{k}_x.npy", X[rows])
        np.save(folder / f"{k}_y.npy", Y[rows])
    return str(folder)


def npz(folder: Path) -> str:
    np.savez(folder / "a.npz", y=Y, other=np.zeros(3), x=X)
    return str(folder / "a.npz")


def parquet(folder: Path) -> str:
    pq.write_table(table(), folder / "a.parquet", row_group_size=70)
    return str(folder / "a.parquet")


def parquet_shards(folder: Path) -> str:
    (folder / "deep").mkdir()
    (folder / "_SUCCESS").write_text("")
    for k, name in enumerate(("a.parquet", "b.parquet", "deep/c.parquet")):
        pq.write_table(table(slice(200 * k, 200 * (k + 1))), folder / name, row_group_size=90)
    return str(folder)


def parquet_lists(folder: Path) -> str:
    lists = pa.table({"label": [f"class {k}" for k in Y], "x": X.tolist()})
    pq.write_table(lists, folder / "a.parquet", row_group_size=70)
    return str(folder / "a.parquet")


def parquet_folders(folder: Path) -> str:
    """Labels in the folders' names, so that the rows' order is another: the first feature still tells the row."""
    for k in range(3):
        (folder / f"kind={k}").mkdir()
        features = table().drop_columns("label").filter(pa.array(k == Y))
        pq.write_table(features, folder / f"kind={k}" / "a.parquet", row_group_size=40)
    return str(folder)


def numbered() -> Dataset:
    class Numbered(Dataset):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, k: int) -> tuple[np.ndarray, int]:
            return X[k], int(Y[k])

    return Numbered()


def iterable() -> IterableDataset:
    class Once(IterableDataset):
        def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
            return zip(X, Y.tolist(), strict=True)

    return Once()


def generator() -> Iterator[tuple[list[float], str]]:
    yield from ((x.tolist(), str(y)) for x, y in zip(X, Y, strict=True))


FILES: dict[str, Callable[[Path], str]] = {
    made.__name__: made for made in (npy, npy_shards, npz, parquet, parquet_shards, parquet_lists, parquet_folders)
}
FACTORIES = {name: f"{__name__}:{name}" for name in ("numbered", "iterable", "generator")}
FORMS = [*FILES, *FACTORIES]


def stored(form: str, folder: Path) -> str:
    """Returns what to give as --data for the set in this form."""
    return FACTORIES[form] if form in FACTORIES else FILES[form](folder)
