"""Anyone's runs as one table: a row a logged value, checked cell by cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ...errors import UserError
from ..output.study_folder import COLUMNS

NEEDED = ("arm", "seed", "step", "metric")
SPLITS = ("val", "test")
NUMERIC = ("lr", "weight_decay", "dropout", "batch_size")
_WHOLE = ("seed", "step")
_PURPOSES = ("choose", "measure")
# Names and results of runs, as in runs.csv: no settings.
_RESULTS = tuple(name for name in COLUMNS if name not in ("arm", "seed", "purpose", "optimizer", *NUMERIC))


@dataclass(frozen=True)
class LongTable:
    """Checked rows in the order of the source.

    `rows` has the columns of NEEDED, `split`, the settings, and `purpose` where the source gave it. `settings` are the
    names of the other columns: a run is one arm, one seed and one value of each.
    """

    name: str
    rows: pd.DataFrame
    settings: tuple[str, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """Return the arms in the order of their first rows: the first is the baseline."""
        return tuple(dict.fromkeys(self.rows["arm"]))


def check_columns(table: pd.DataFrame, name: str) -> None:
    """Refuse a table that lacks a column of NEEDED, or has one twice."""
    if missing := [column for column in NEEDED if column not in table.columns]:
        found = ", ".join(str(column) for column in table.columns[:12]) or "nothing"
        raise UserError(f"no column {', '.join(missing)}, {name}, name the columns {','.join(NEEDED)} (found: {found})")
    if doubled := table.columns[table.columns.duplicated()].tolist():
        raise UserError(f"two columns are named {doubled[0]!r}, {name}, rename one")


def check_table(table: pd.DataFrame, name: str) -> LongTable:
    """Return the table with its types after checking every cell.

    Raises:
        UserError: names the column and the row.
    """
    table = table.rename(columns=str)
    check_columns(table, name)
    if table.empty:
        raise UserError(f"no rows, {name}, write one row a logged value")
    rows = table.assign(arm=table["arm"].astype(str).str.strip())
    if (empty := rows["arm"].isin(["", "nan", "None"]) & table["arm"].isin(["", None, np.nan])).any():
        raise _at(empty, name, "no arm", "name the arm of every row")
    for column in _WHOLE:
        rows[column] = _whole_numbers(table[column], column, name)
    rows["metric"] = _numbers(table["metric"], "metric", name, holes=True)
    rows["split"] = table["split"].astype(str).str.strip() if "split" in table else "val"
    if (other := ~rows["split"].isin(SPLITS)).any():
        raise _at(other, name, f"split {rows['split'][other].iloc[0]!r}", "write val or test")
    settings = tuple(column for column in table.columns if column not in (*NEEDED, "split", "purpose", *_RESULTS))
    for column in settings:
        rows[column] = _setting(table[column], column, name)
    if "purpose" in table and (other := ~rows["purpose"].isin(_PURPOSES)).any():
        raise _at(other, name, f"purpose {rows['purpose'][other].iloc[0]!r}", "write choose or measure")
    _check_doubles(rows, settings, name)
    _check_changing(rows, settings, name)
    if rows["arm"].nunique() < 2:
        raise UserError(f"a single arm {rows['arm'].iloc[0]!r}, {name}, give runs of at least two arms to compare")
    return LongTable(name, rows, settings)


def _check_doubles(rows: pd.DataFrame, settings: tuple[str, ...], name: str) -> None:
    keys = ["arm", "seed", *settings, "split", "step"]
    doubled = rows.duplicated(keys)
    if doubled.any():
        row = rows[doubled].iloc[0]
        raise _at(
            doubled, name, f"a second value of arm {row['arm']!r}, seed {row['seed']}, step {row['step']}",
            "give each run its own seed or a column that tells it from the other",
        )  # fmt: skip


def _check_changing(rows: pd.DataFrame, settings: tuple[str, ...], name: str) -> None:
    """Refuse a column that makes every row a run of its own, such as a time: it is no setting."""
    for column in settings:
        groups = rows.groupby([key for key in ("arm", "seed", "split", *settings) if key != column], sort=False)
        # A sweep with one row a run differs in the column too, but not in the step.
        differs = (groups[key].nunique().eq(groups.size()).all() for key in (column, "step"))
        if column not in NUMERIC and len(rows) >= 2 * groups.ngroups and all(differs):
            raise UserError(f"column {column!r} changes from row to row, {name}, leave it out: a setting is a run's")


def _at(bad: pd.Series, name: str, what: str, do: str) -> UserError:
    """Return the error for the first bad row."""
    return UserError(f"{what} in row {int(np.argmax(bad.to_numpy())) + 1}, {name}, {do}")


def _numbers(column: pd.Series, label: str, name: str, *, holes: bool = False) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype("float64")
    text = column.map(lambda cell: str(cell).strip().lower())
    # NaN as a value is a training that broke; an empty cell is a mistake.
    told = numbers.notna() | (holes & text.isin(["nan", "inf", "-inf"]) & ~(column == ""))
    if not told.all():
        bad = column[~told].iloc[0]
        raise _at(~told, name, f"{label} is {str(bad)[:40]!r}", "write a number")
    return numbers


def _whole_numbers(column: pd.Series, label: str, name: str) -> pd.Series:
    numbers = _numbers(column, label, name)
    if (broken := (numbers % 1 != 0) | (numbers < 0)).any():
        raise _at(broken, name, f"{label} is {str(column[broken].iloc[0])[:40]!r}", "write a whole number from 0 on")
    return numbers.astype("int64")


def _setting(column: pd.Series, label: str, name: str) -> pd.Series:
    """Return a setting with its type: those of NUMERIC are numbers, an empty cell of a regularizer is 0."""
    if label not in NUMERIC:
        return column.where(column.notna(), "").astype(str).str.strip()
    if label in ("weight_decay", "dropout"):
        column = column.where(column.notna() & (column.astype(str).str.strip() != ""), "0")
    numbers = _numbers(column, label, name)
    if label == "lr" and (bad := numbers <= 0).any():
        raise _at(bad, name, f"lr is {numbers[bad].iloc[0]:g}", "write a positive learning rate")
    return numbers
