"""What is wrong with streamed data, or with the disk, is one line that names the file and the row."""

import errno
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchnorm.cli import main
from batchnorm.experiment.data import sources as source
from batchnorm.experiment.data import survey
from tests.cli.conftest import refused
from tests.experiment.stream_sets import ROWS, X, Y, npy, npy_shards, parquet_shards, table

SHORT = ("--quick", "--lrs", "0.1", "--steps", "3", "--workers", "1", "--batch-size", "20")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(source, "WHOLE_BYTES", 1000)


def with_value(at: int, value: object) -> pa.Table:
    """Returns the set with another value of `f2` in one row."""
    values = [*X[:at, 2].tolist(), value, *X[at + 1 :, 2].tolist()]
    return table().set_column(2, "f2", pa.array(values, pa.float64()))


def shard(made: pa.Table, row_group: int = 70) -> None:
    Path("set").mkdir()
    parquet_shards(Path("set"))
    pq.write_table(made, "set/m.parquet", row_group_size=row_group)


def truncated_parquet() -> None:
    shard(table())
    Path("set/m.parquet").write_bytes(Path("set/m.parquet").read_bytes()[:-200])


def damaged_parquet() -> None:
    shard(table(), 300)
    whole = bytearray(Path("set/m.parquet").read_bytes())
    whole[4:40] = b"\xff" * 36
    Path("set/m.parquet").write_bytes(whole)


def other_labels_missing() -> None:
    shard(table().set_column(4, "label", pa.array([None if k == 123 else int(y) for k, y in enumerate(Y)])))


def pairs() -> None:
    Path("set").mkdir()
    npy_shards(Path("set"))


def truncated_npy() -> None:
    pairs()
    Path("set/2_x.npy").write_bytes(Path("set/2_x.npy").read_bytes()[:-5])


def npy_with(name: str, values: np.ndarray) -> Callable[[], None]:
    def make() -> None:
        pairs()
        np.save(f"set/{name}", values)

    return make


def no_labels() -> None:
    pairs()
    Path("set/1_y.npy").unlink()


def hole(dtype: type, at: int) -> np.ndarray:
    values = X[251:].astype(dtype)
    values[at, 2] = np.nan
    return values


ODD_LISTS = [[1.0, 2.0]] * 100 + [[1.0]] + [[1.0, 2.0]] * (ROWS - 101)
CASES: dict[str, tuple[Callable[[], object], str, str]] = {
    "truncated": (truncated_parquet, "not a whole Parquet file", "set/m.parquet"),
    "damaged": (damaged_parquet, "not a whole Parquet file", "set/m.parquet"),
    "a column less": (lambda: shard(table().drop_columns("f1")), "no column 'f1'", "set/m.parquet"),
    "a column more": (lambda: shard(table().append_column("g", pa.array(Y))), "a column 'g'", "set/m.parquet"),
    "another type": (
        lambda: shard(table().set_column(1, "f1", pa.array(X[:, 1].astype(np.float32)))),
        "column 'f1' is float",
        "set/m.parquet",
    ),
    "NaN": (lambda: shard(with_value(345, float("nan"))), "NaN value at column 'f2', row 346", "set/m.parquet"),
    "null": (lambda: shard(with_value(345, None)), "NaN value in column 'f2' at row 346", "set/m.parquet"),
    "infinite": (lambda: shard(with_value(2, float("inf"))), "infinite value at column 'f2', row 3", "set/m.parquet"),
    "no label": (other_labels_missing, "no label in column 'label' at row 124", "set/m.parquet"),
    "no rows": (lambda: (Path("set").mkdir(), pq.write_table(table()[:0], "set/a.parquet")), "no rows", "set"),
    "text": (
        lambda: (Path("set").mkdir(), pq.write_table(table().set_column(0, "f0", pa.array(["a"] * ROWS)), "set/a.pq")),
        "column 'f0' is of type string",
        "set/a.pq",
    ),
    "index": (
        lambda: (
            Path("set").mkdir(),
            pd.DataFrame(X).add_prefix("f").assign(y=Y).sample(frac=1).to_parquet("set/a.parquet"),
        ),
        "row index of pandas",
        "set/a.parquet",
    ),
    "odd lists": (
        lambda: (Path("set").mkdir(), pq.write_table(pa.table({"x": ODD_LISTS, "label": Y}), "set/a.parquet")),
        "a list of 1 values and not 2 in column 'x' at row 101",
        "set/a.parquet",
    ),
    "empty folder": (lambda: Path("set").mkdir(), "no subfolders", "set"),
    "truncated npy": (truncated_npy, "truncated, 5 bytes are missing", "set/2_x.npy"),
    "other features": (npy_with("2_x.npy", X[251:, :3]), "shape (3,)", "set/2_x.npy"),
    "other dtype": (npy_with("2_x.npy", X[251:].astype(np.float32)), "dtype float32", "set/2_x.npy"),
    "NaN in npy": (npy_with("2_x.npy", hole(float, 17)), "x[17, 2]", "set/2_x.npy"),
    "NaN label": (npy_with("2_y.npy", np.where(Y[251:] == 1, np.nan, 1)), "is NaN or infinite", "set/2_y.npy"),
    "objects": (npy_with("2_x.npy", np.array([{}] * 349, object)), "object arrays", "set/2_x.npy"),
    "Fortran order": (npy_with("2_x.npy", np.asfortranarray(X[251:])), "Fortran order", "set/2_x.npy"),
    "fewer labels": (npy_with("2_y.npy", Y[252:]), "349 samples but 348 labels", "set/2_x.npy"),
    "no labels": (no_labels, "save one label a sample as 1_y.npy", "set/1_x.npy"),
    "no npy": (lambda: (pairs(), Path("set/2_x.npy").write_bytes(b"x" * 500)), "not a .npy file", "set/2_x.npy"),
    "quantities": (npy_with("2_y.npy", np.linspace(0, 1, 349)), "more than 100 different labels", "set"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_sets(case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make, says, where = CASES[case]
    monkeypatch.setattr(survey, "MOST_LABELS", 100)
    make()
    capsys.readouterr()
    line = refused_after_reading(capsys, "study", "--data", "set")
    assert says in line
    assert where in line
    assert not Path("study").exists()


def refused_after_reading(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Like `refused`, for what shows only on reading: the networks and lines of progress may be on stdout before it."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out
    assert err.startswith("batchnorm: ")
    assert err.count("\n") == 1
    assert err.count(", ") >= 2, "WHAT, WHERE, WHAT TO DO"
    return err


@pytest.mark.parametrize("name", ["b.npy", "c.txt", "missing_x.npy"])
def test_files_of_no_known_kind(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not name.startswith("missing"):
        np.save(name, X) if name.endswith("npy") else Path(name).write_text("x")
    assert name in refused(capsys, "study", "--data", name)


def test_a_large_compressed_npz_says_how_to_unpack_it(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez_compressed("a.npz", x=np.repeat(X, 10, 0), y=np.repeat(Y, 10))
    assert "python -m zipfile -e a.npz a and give a/x.npy" in refused(capsys, "study", "--data", "a.npz")
    with zipfile.ZipFile("a.npz") as archive:
        archive.extractall("a")
    assert source.Source.is_large.fget(survey_source("a/x.npy"))


def survey_source(path: str) -> source.Source:
    from batchnorm.experiment.data.opening import open_source

    opened = open_source(path)
    assert opened is not None
    return opened


DATA = {
    "raises": ("def f():\n    raise RuntimeError('no\\nway')", "RuntimeError: no way"),
    "a network": ("def f():\n    return torch.nn.Linear(2, 2)", "returns Linear"),
    "a loader": ("def f():\n    return torch.utils.data.DataLoader([1])", "returns DataLoader"),
    "nothing": ("def f():\n    return None", "returns NoneType"),
    "empty": ("def f():\n    return []", "no samples"),
    "empty iterable": ("def f():\n    yield from ()", "no samples"),
    "no pairs": ("def f():\n    return [torch.zeros(3)] * 200", "sample 0 is no pair but Tensor"),
    "text": ("def f():\n    return [('a', 0)] * 200", "x of sample 0 is <U1"),
    "other shape": ("def f():\n    return [(torch.zeros(3 + (k == 77)), k % 2) for k in range(200)]", "sample 77"),
    "other dtype": (
        "def f():\n    return [([1.5 if k == 77 else 1], k % 2) for k in range(200)]",
        "sample 77 is float64",
    ),
    "NaN": ("def f():\n    return [([float('nan') if k == 77 else 1.0], k % 2) for k in range(200)]", "sample 77"),
    "no label": ("def f():\n    return [([1.0 * k], float('nan') if k == 77 else 1) for k in range(200)]", "label 77"),
    "breaks off": (
        "def f():\n    for k in range(200):\n        assert k != 77, 'lost'\n        yield [1.0 * k], k % 2",
        "sample 77 raises (AssertionError: lost)",
    ),
    "another length": (
        "calls = []\ndef f():\n    calls.append(0)\n"
        "    yield from (([1.0 * k], k % 2) for k in range(200 - len(calls)))",
        "return the same samples each time",
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_sets_of_a_function(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    written, says = DATA[case]
    module = f"bad_data_{case.replace(' ', '_')}"
    Path(f"{module}.py").write_text(f"import torch\n{written}\n")
    line = refused_after_reading(capsys, "study", "--data", f"{module}:f")
    assert says in line
    assert f"{module}:f" in line


def test_without_pyarrow_the_line_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(table(), "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'batchnorm[stream]'" in refused(capsys, "study", "--data", "a.parquet")


def test_a_batch_too_large_to_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("batchnorm.experiment.data.streamed.LARGEST_BATCH", 100 * X[0].nbytes)
    name = npy(tmp_path)
    assert "--batch-size 101" in refused_after_reading(capsys, "study", "--data", name, *SHORT[:-1], "101")


def test_a_full_disk_keeps_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = npy(tmp_path)
    assert main(["study", "--data", name, "--out", "whole", *SHORT]) == 0
    whole = pd.read_csv("whole/runs.csv")
    room = [2 + 2 * 9]  # plan.json and runs.csv, then a trace and a row for each of nine runs

    def fsync(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["study", "--data", name, "--out", "full", *SHORT]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "No space left on device" in line
    assert "--out full, make room and continue with --resume" in line
    assert len(pd.read_csv("full/runs.csv")) == 9
    assert not list(Path("full").rglob("*.partial"))
    ages = {path.name: path.stat().st_mtime_ns for path in Path("full/traces").iterdir()}
    # Again full, this time when all runs are there and the report is written.
    room[0] = 1 + 2 * (len(whole) - 9)
    assert main(["study", "--data", name, "--out", "full", "--resume", *SHORT]) == 2
    assert "continue with --resume" in capsys.readouterr().err
    assert len(pd.read_csv("full/runs.csv")) == len(whole)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "WHOLE_BYTES", 1000)
    assert main(["study", "--data", name, "--out", "full", "--resume", *SHORT]) == 0
    assert pd.read_csv("full/runs.csv").drop(columns="seconds").equals(whole.drop(columns="seconds"))
    assert ages.items() <= {path.name: path.stat().st_mtime_ns for path in Path("full/traces").iterdir()}.items()
