"""From Arrow's columns to samples and labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import UserError
from .sources import label_text

Place = Callable[[int], str]  # from a row's position in the block to where it is in the file, in words


def value_dtype(type: Any) -> np.dtype | None:
    """Return the dtype of a column's numbers, those inside its lists included; None for anything else."""
    import pyarrow.types as types

    while is_list(type):
        type = type.value_type
    if not (types.is_integer(type) or types.is_floating(type) or types.is_boolean(type)):
        return None
    return np.dtype(type.to_pandas_dtype())


def is_list(type: Any) -> bool:
    """Return whether a column holds a list of values a row."""
    import pyarrow.types as types

    return bool(types.is_fixed_size_list(type) or types.is_list(type) or types.is_large_list(type))


def samples_of(batch: Any, names: list[str], constants: dict[str, Any], dtype: np.dtype, place: Place) -> np.ndarray:
    """Return columns of numbers as (rows, columns), a single column of (nested) lists as (rows, *lengths).

    Args:
        batch: an Arrow record batch.
        names: the columns, in order.
        constants: those of them that are not in the batch but the same number in every row.
        dtype: that holds every column's numbers.
        place: says where a row is.

    Raises:
        UserError: an empty value, or lists of different lengths, with its row.
    """
    columns = {name: batch.column(name) for name in names if name not in constants}
    types = {column.type for column in columns.values()}
    if len(names) == 1 and columns and is_list(columns[names[0]].type):
        return _sample_array(columns[names[0]], names[0], place)
    alike = not constants and len(types) == 1 and dtype.kind != "b"
    if alike and not any(column.null_count for column in columns.values()):
        return np.asarray(batch.select(names).to_tensor(row_major=True).to_numpy())  # the same, without a loop
    x = np.empty((batch.num_rows, len(names)), dtype)
    for k, name in enumerate(names):
        x[:, k] = _sample_array(columns[name], name, place) if name in columns else constants[name]
    return x


def _sample_array(column: Any, name: str, place: Place) -> np.ndarray:
    import pyarrow.compute as compute

    rows, lengths = len(column), list[int]()
    while True:
        inside = math.prod(lengths)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]) // inside
            raise UserError(
                f"an empty or NaN value in column {name!r} at {place(row)}, fill it in or leave the row out"
            )
        if not is_list(column.type):
            break
        sizes = compute.list_value_length(column).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero(sizes != sizes[0])
        if len(odd):
            row = int(odd[0])
            raise UserError(
                f"a list of {sizes[row]} values and not {sizes[0]} in column {name!r} at {place(row // inside)}, "
                "give every sample the same shape"
            )
        lengths.append(int(sizes[0]))
        column = column.flatten()
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(rows, *lengths)


def labels_of(column: Any, name: str, place: Place) -> tuple[list[str], np.ndarray]:
    """Return the different labels as text and the number of each row's.

    Raises:
        UserError: a row without a label.
    """
    import pyarrow.types as types

    encoded = column if types.is_dictionary(column.type) else column.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    unusable = [k for k, v in enumerate(values) if v is None or (isinstance(v, float) and not math.isfinite(v))]
    codes = encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
    missing = np.flatnonzero(np.isin(codes, [*unusable, len(values)]))
    if len(missing):
        raise UserError(f"no label in column {name!r} at {place(int(missing[0]))}, label it or leave the row out")
    return [label_text(value) for value in values], codes
