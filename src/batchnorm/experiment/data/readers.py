"""One reader for each kind of data source. Nothing read here is executed: no pickle, labels are plain text."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...errors import UserError, quote_error
from .samples import Samples
from .sources import check_finite, encode_labels

if TYPE_CHECKING:
    import pandas as pd


class Array(Protocol):
    """An array in memory or in a file."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def read_digits() -> Samples:
    """Return scikit-learn's digits as images (1, 8, 8)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Samples("digits", x.reshape(-1, 1, 8, 8), y.astype(str))


def read_openml(source: str) -> Samples:
    """Return the data set that ``openml:NAME`` names."""
    from sklearn.datasets import fetch_openml

    name = source.removeprefix("openml:")
    if not name:
        raise UserError("no name after openml:, study(data=openml:), give one as in openml:mnist_784")
    try:
        with warnings.catch_warnings():
            # Of several active versions of a data set scikit-learn takes the oldest, and warns each time.
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
    """Return the arrays `x` (samples first) and `y` of a .npz file; object arrays are refused."""
    try:
        # The file is opened here, because numpy does not close a damaged file.
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
        if "Object arrays" in str(error):  # numpy says this of every pickled member
            raise UserError(
                f"object arrays, {path}, save x and y as numbers or text (dtype other than object)"
            ) from error
        raise UserError(f"not a .npz file, {path}, write it with np.savez(FILE, x=samples, y=labels)") from error
    except Exception as error:  # zipfile, zlib and numpy raise different types for a damaged file
        if isinstance(error, OSError):
            raise
        raise UserError(f"not a .npz file, {path}, write it with np.savez(FILE, x=samples, y=labels)") from error
    check_layout(x, y, path)
    check_labels(y, 0, path)
    check_finite(x, lambda index: f"x[{', '.join(map(str, index))}], {path}")
    return Samples(path.name, x, _label_text(y))


def check_layout(x: Array, y: Array, path: Path) -> None:
    """Refuse arrays whose shapes or dtypes are not those of samples and their labels."""
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


def check_labels(y: np.ndarray, first: int, path: Path) -> None:
    """Refuse labels that are no numbers; `first` is the number of the first sample."""
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        missing = first + int(np.flatnonzero(~np.isfinite(y))[0])
        raise UserError(f"label {missing} is NaN or infinite, {path}, label every sample")


def read_csv(path: Path) -> Samples:
    """Return the rows of a .csv file; the label is the column `label`, else the last one."""
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
    """Return the label column's name; refuse what would silently train on the wrong thing."""
    import pandas as pd

    names = [str(name).strip() for name in header]
    if len(table.columns) < 2:
        raise UserError(
            f"only one column {names[0]!r}, {path}, give feature columns and a column label, comma-separated"
        )
    if not isinstance(table.index, pd.RangeIndex):
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_counter(names: list[str]) -> bool:
    """Return whether the names are 0, 1, 2, … or 1, 2, 3, …: what pandas writes for unnamed columns."""
    return names in ([str(k) for k in range(len(names))], [str(k + 1) for k in range(len(names))])


def _feature_matrix(features: pd.DataFrame, where: str) -> np.ndarray:
    """Return the columns as float64 (rows, columns); refuse anything but finite numbers, naming it."""
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
    check_finite(numbers, lambda index: f"column {str(features.columns[index[1]])!r}, data row {index[0] + 1}, {where}")
    return numbers


def _text_labels(column: pd.Series, where: str) -> np.ndarray:
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
    labels, codes = encode_labels(y)
    return np.asarray(labels, str)[codes]
