"""One reader for each kind of data source. Nothing read here is executed: no pickle, labels are plain text."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError, quote_error
from ..experiment.data import Samples

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from ..experiment.streams.source import Source


class Array(Protocol):
    """An array, or one that lies in a file."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def read(source: str) -> Samples:
    """Returns the samples of any source that `find` takes, all of them.

    Raises:
        UserError: the source is missing, unreadable or holds what no network can be trained on.
    """
    found = find(source)
    return found if isinstance(found, Samples) else found.whole()


def find(source: str) -> Samples | Source:
    """Returns the samples of ``digits``, ``openml:NAME``, FILE.npz, FILE.csv, NAME_x.npy, FILE.parquet, a folder of
    images, .parquet or NAME_x.npy files, or ``pkg.mod:function``; where they are many, the source to stream from.

    Raises:
        UserError: the source is missing, unreadable or holds what no network can be trained on.
    """
    if source == "digits":
        return _read_digits()
    if source.startswith("openml:"):
        return _read_openml(source)
    path = Path(source)
    try:
        if not path.exists() and ":" not in source:
            raise UserError(
                f"no such file or folder, {source}, give the path of a .npz, .npy, .csv or .parquet file or a folder "
                "(or digits, or openml:NAME, or pkg.mod:function)"
            )
        from ..experiment.streams.kinds import open_source

        opened = open_source(source)
        if opened is not None:
            return opened if opened.is_large else opened.whole()
        return {".npz": read_npz, ".csv": read_csv}[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(
            f"cannot be read ({quote_error(error)}), {source}, check the file and its permissions"
        ) from error


def _read_digits() -> Samples:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Samples("digits", x.reshape(-1, 1, 8, 8), y.astype(str))


def _read_openml(source: str) -> Samples:
    from sklearn.datasets import fetch_openml

    name = source.removeprefix("openml:")
    if not name:
        raise UserError("no name after openml:, --data openml:, give one as in openml:mnist_784")
    try:
        with warnings.catch_warnings():
            # Several active versions of a data set: scikit-learn takes the oldest, and says so every time.
            warnings.simplefilter("ignore")
            bunch = fetch_openml(name=name, as_frame=True, parser="auto")
    except Exception as error:
        raise UserError(
            f"cannot be fetched ({quote_error(error, 120)}), {source}, check the name and the network "
            "or give a local file"
        ) from error
    if bunch.target is None or getattr(bunch.target, "ndim", 1) != 1:
        raise UserError(f"no single label column, {source}, choose a data set made for classification")
    return Samples(source, _feature_matrix(bunch.data, source), _text_labels(bunch.target, source))


def read_npz(path: Path) -> Samples:
    """Returns arrays `x` (samples first) and `y` of a .npz file, object arrays refused."""
    import numpy as np

    try:
        # Opened here, because numpy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in ("x", "y") if key not in archive.files]
            if missing:
                held = ", ".join(archive.files) or "nothing"
                raise UserError(
                    f"no array {' and no array '.join(missing)} (it holds {held}), {path}, "
                    "save it as np.savez(FILE, x=samples, y=labels)"
                )
            x, y = archive["x"], archive["y"]
    except UserError:
        raise
    except ValueError as error:
        if "Object arrays" in str(error):  # numpy says the same of any member that is pickled
            raise UserError(
                f"object arrays, {path}, save x and y as numbers or text (dtype other than object)"
            ) from error
        raise UserError(f"not a .npz file, {path}, write it with np.savez(FILE, x=samples, y=labels)") from error
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        if isinstance(error, OSError):
            raise
        raise UserError(f"not a .npz file, {path}, write it with np.savez(FILE, x=samples, y=labels)") from error
    check_layout(x, y, path)
    _check_values(x, y, path)
    return Samples(path.name, x, _label_text(y))


def check_layout(x: Array, y: Array, path: Path) -> None:
    """Refuses arrays whose shapes or dtypes are not those of samples and their labels."""
    if x.dtype.kind not in "biuf":
        raise UserError(f"x is of dtype {x.dtype}, {path}, save it as real numbers")
    if y.dtype.kind not in "biufU":
        raise UserError(f"y is of dtype {y.dtype}, {path}, save the labels as numbers or text")
    if len(x.shape) < 2 or 0 in x.shape:
        wanted = "give at least one sample with one feature, as in x of shape (samples, features)"
        raise UserError(f"x has shape {x.shape}, {path}, {wanted}")
    if len(y.shape) != 1:
        raise UserError(f"y has shape {y.shape}, {path}, give one label a sample as in ({x.shape[0]},)")
    if x.shape[0] != y.shape[0]:
        raise UserError(f"{x.shape[0]} samples but {y.shape[0]} labels, {path}, give one label a sample")


def _check_values(x: np.ndarray, y: np.ndarray, path: Path) -> None:
    import numpy as np

    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise UserError(
            f"label {int(np.flatnonzero(~np.isfinite(y))[0])} is NaN or infinite, {path}, label every sample"
        )
    bad = ~np.isfinite(x)
    if bad.any():
        where = ", ".join(str(int(k)) for k in np.argwhere(bad)[0])
        raise UserError(f"NaN or infinite value at x[{where}], {path}, fill it in or leave the sample out")


def read_csv(path: Path) -> Samples:
    """Returns the rows of a .csv file; the label is the column `label`, else the last one."""
    import pandas as pd

    try:
        header = list(pd.read_csv(path, header=None, nrows=1, dtype=str, encoding_errors="strict").iloc[0])
        table = pd.read_csv(path, low_memory=False)
    except pd.errors.EmptyDataError as error:
        raise UserError(f"no rows, {path}, give a header row and one row a sample") from error
    except (pd.errors.ParserError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise UserError(
            f"not a table ({quote_error(error, 120)}), {path}, write comma-separated text in UTF-8"
        ) from error
    label = _check_columns(table, header, path)
    if len(table) == 0:
        raise UserError(f"no rows below the header, {path}, give one row a sample")
    return Samples(
        path.name, _feature_matrix(table.drop(columns=label), str(path)), _text_labels(table[label], str(path))
    )


def _check_columns(table: pd.DataFrame, header: list[Any], path: Path) -> str:
    """Returns the label column's name; refuses what would silently train on the wrong thing."""
    names = [str(name).strip() for name in header]
    if len(table.columns) < 2:
        raise UserError(
            f"only one column {names[0]!r}, {path}, give feature columns and a column label, comma-separated"
        )
    if not isinstance(table.index, _range_index()):
        raise UserError(f"rows are longer than the header row, {path}, give every column a name")
    unnamed = [k for k, name in enumerate(header) if name != name or not str(name).strip()]
    if unnamed:
        raise UserError(
            f"column {unnamed[0] + 1} has no name (a row index, which would tell the labels?), {path}, "
            "name or remove it"
        )
    repeated = next((name for name in names if names.count(name) > 1), None)
    features = names[:-1]
    if all(_is_number(name) for name in features) and not _is_counter(features):
        raise UserError(f"the first row looks like a sample, {path}, put a row of column names above it")
    if repeated is not None:
        raise UserError(f"two columns are named {repeated!r}, {path}, give each its own name")
    return str(
        next((column for column, name in zip(table.columns, names, strict=True) if name == "label"), table.columns[-1])
    )


def _range_index() -> type:
    import pandas as pd

    return pd.RangeIndex


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_counter(names: list[str]) -> bool:
    """Tells whether the names are 0, 1, 2, … or 1, 2, 3, …: what pandas writes for unnamed columns."""
    return names in ([str(k) for k in range(len(names))], [str(k + 1) for k in range(len(names))])


def _feature_matrix(features: pd.DataFrame, where: str) -> np.ndarray:
    """Returns the columns as float64 (rows, columns); anything but a finite number is named and refused."""
    import numpy as np
    import pandas as pd

    if features.shape[1] == 0:
        raise UserError(f"no feature columns, {where}, give at least one besides the label")
    numbers = np.empty(features.shape, dtype=np.float64)
    for k, name in enumerate(features.columns):
        column = features[name]
        try:
            numbers[:, k] = pd.to_numeric(column, errors="raise").to_numpy(dtype=np.float64, na_value=np.nan)
        except (ValueError, TypeError) as error:
            parsed = pd.to_numeric(column.astype(str), errors="coerce")
            row = int(np.flatnonzero((parsed.isna() & column.notna()).to_numpy())[0])
            raise UserError(
                f"{str(column.iloc[row])[:40]!r} in column {str(name)!r}, data row {row + 1}, is no number, {where}, "
                "encode text features as numbers or remove the column"
            ) from error
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        row, k = (int(index) for index in bad[0])
        what = "an empty or NaN value" if np.isnan(numbers[row, k]) else "an infinite value"
        raise UserError(
            f"{what} in column {str(features.columns[k])!r}, data row {row + 1}, {where}, fill it in or remove the row"
        )
    return numbers


def _text_labels(column: pd.Series, where: str) -> np.ndarray:
    import numpy as np

    missing = np.flatnonzero(column.isna().to_numpy())
    if len(missing):
        raise UserError(
            f"no label in column {str(column.name)!r}, data row {int(missing[0]) + 1}, {where}, "
            "label it or remove the row"
        )
    values = column.to_numpy()
    if values.dtype.kind not in "biuf":
        values = np.asarray([str(value).strip() for value in values])
    return _label_text(values)


def _label_text(y: np.ndarray) -> np.ndarray:
    """Returns labels as text; whole numbers stored as floats lose their ".0" (3.0 is the label 3)."""
    import numpy as np

    if y.dtype.kind == "f" and (y == np.trunc(y)).all() and (np.abs(y) < 2**53).all():
        y = y.astype(np.int64)
    return y.astype(str)
