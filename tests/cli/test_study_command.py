"""`batchnorm study` as a user meets it: one line for a mistake, the three files as the last lines."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchnorm.cli import main
from tests.cli.conftest import refused
from tests.experiment.conftest import SMALL

ROWS = [f"{k % 7}.5,{k % 5},{'abc'[k % 3]}" for k in range(30)]


def csv(*rows: str, header: str = "a,b,label") -> str:
    return "\n".join([header, *rows]) + "\n"


BAD_CSV = {
    "text-feature": (csv(*ROWS[:4], "red,1,a", *ROWS), r"'red' in column 'a', data row 5"),
    "nan": (csv(*ROWS[:4], "nan,1,a", *ROWS), "column 'a', data row 5"),
    "hole": (csv(*ROWS[:4], "1,,a", *ROWS), "column 'b', data row 5"),
    "inf": (csv(*ROWS[:4], "1,inf,a", *ROWS), "infinite value at column 'b', data row 5"),
    "no-label": (csv(*ROWS[:4], "1,1,", *ROWS), "no label in column 'label', data row 5"),
    "single-class": (csv(*(row[:-1] + "a" for row in ROWS)), "single class 'a'"),
    "rare-class": (csv(*ROWS, "1,1,z", "1,1,z"), "class 'z' has 2"),
    "no-rows": (csv(), "no rows"),
    "empty": ("", "no rows"),
    "one-column": (csv("1", "2", header="a"), "only one column"),
    "too-long-row": (csv(*ROWS[:4], "1,2,3,4", *ROWS), "not a table"),
    "longer-rows": (csv(*(f"9,{row}" for row in ROWS)), "longer than the header"),
    "no-header": (csv(*ROWS[1:], header=ROWS[0]), "looks like a sample"),
    "index-column": (csv(*(f"{k},{row}" for k, row in enumerate(ROWS)), header=",a,b,label"), "column 1 has no name"),
    "same-names": (csv(*ROWS, header="a,a,label"), "two columns are named 'a'"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, says = BAD_CSV[case]
    (tmp_path / "bad.csv").write_text(text)
    line = refused(capsys, "study", "--data", "bad.csv")
    assert says in line
    assert "bad.csv" in line
    assert not Path("study").exists()


X, Y = np.arange(60.0).reshape(30, 2), np.arange(30) % 3
HOLE = np.where(X == 7, np.nan, X)
BAD_NPZ: dict[str, tuple[dict[str, object], str]] = {
    "objects": ({"x": np.array([{}, 1] * 15, dtype=object), "y": Y}, "object arrays"),
    "no-y": ({"x": X}, "no array y"),
    "nan": ({"x": HOLE, "y": Y}, "x[3, 1]"),
    "single-class": ({"x": X, "y": 0 * Y}, "single class '0'"),
    "rare-class": ({"x": X, "y": np.r_[Y[:-1], 9]}, "class '9' has 1"),
    "zero-rows": ({"x": X[:0], "y": Y[:0]}, "shape (0, 2)"),
    "mismatch": ({"x": X, "y": Y[:-1]}, "30 samples but 29 labels"),
    "one-hot": ({"x": X, "y": np.eye(3)[Y]}, "y has shape (30, 3)"),
    "nan-label": ({"x": X, "y": np.where(Y == 1, np.nan, Y)}, "label 1 is NaN"),
    "complex": ({"x": X + 1j, "y": Y}, "complex128"),
    "text": ({"x": X.astype(str), "y": Y}, "real numbers"),
    "flat": ({"x": X[:, 0], "y": Y}, "shape (30,)"),
    "huge": ({"x": X * 1e305, "y": Y}, "too large"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, says = BAD_NPZ[case]
    np.savez("bad.npz", **arrays)
    line = refused(capsys, "study", "--data", "bad.npz")
    assert says in line
    assert "bad.npz" in line


@pytest.mark.parametrize("name", ["junk.npz", "junk.csv"])
def test_binary_junk(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).write_bytes(np.random.default_rng(0).bytes(3000))
    assert name in refused(capsys, "study", "--data", name)


def test_a_truncated_npz(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("t.npz", x=X, y=Y)
    Path("t.npz").write_bytes(Path("t.npz").read_bytes()[:-100])
    assert "t.npz" in refused(capsys, "study", "--data", "t.npz")


def test_bad_image_folders(capsys: pytest.CaptureFixture[str]) -> None:
    Path("images").mkdir()
    assert "no subfolders" in refused(capsys, "study", "--data", "images")
    for label in "ab":
        Path("images", label).mkdir()
    assert "images/a" in refused(capsys, "study", "--data", "images")
    for label in "ab":
        for k in range(4):
            Image.new("L", (8, 8), k).save(f"images/{label}/{k}.png")
    Path("images/b/9\x1b[31m.png").write_bytes(b"no image")
    line = refused(capsys, "study", "--data", "images")
    assert "not a readable image" in line
    assert "images/b/9" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--data", "missing.csv"), "missing.csv"),
        (("--data", "missing"), "no such file"),
        (("--arms", "none,foo"), "'foo'"),
        (("--arms", "none"), "at least two"),
        (("--arms", "none,none"), "twice"),
        (("--arms", "none,instance"), "fully connected"),
        (("--model", "bla"), "'bla'"),
        (("--model", "nomodule:f"), "nomodule"),
        (("--seeds", "1"), "--seeds"),
        (("--seeds", "x"), "--seeds"),
        (("--seeds",), "--seeds"),
        (("--lrs", "a"), "--lrs"),
        (("--lrs", "0"), "--lrs"),
        (("--lrs", "1,1"), "twice"),
        (("--steps", "0"), "--steps"),
        (("--batch-size", "1"), "60,1"),
        (("--batch-size", "0"), "--batch-size"),
        (("--batch-size", "-8"), "'-8'"),
        (("--batch-size", "8,x"), "'x'"),
        (("--batch-size", "8,,2"), "''"),
        (("--batch-size", "8,2,8"), "twice"),
        (("--batch-size", "60,1080"), "1079 training samples"),
        (("--batch-size", "full,1079"), "full is 1079"),
        (("--optimizer", "rprop"), "'rprop'"),
        (("--optimizer", "sgd,foo"), "'foo'"),
        (("--optimizer", "sgd,sgd"), "twice"),
        (("--optimizer", ""), "''"),
        (("--workers", "0"), "--workers"),
        (("--engine", "slurm"), "slurm"),
        (("--address", "auto"), "--engine ray"),
        (("--log", "wandb"), "wandb"),
        (("--foo",), "--foo"),
        (("extra",), "extra"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, "study", *arguments)


NETS = {
    "raises": ("def f():\n    raise RuntimeError('no\\nway')", "RuntimeError: no way"),
    "no-module": ("def f():\n    return 3", "returns int"),
    "too-wide": ("def f():\n    return n.Sequential(n.Linear(4, 5), n.ReLU(), n.Linear(5, 7))", "(2, 7)"),
    "wrong-input": ("def f():\n    return n.Sequential(n.Linear(3, 5), n.ReLU(), n.Linear(5, 3))", "(4,)"),
    "needs-more": ("def f(depth):\n    return n.Linear(4, 3)", "depth"),
    "shallow": ("def f():\n    return n.Linear(4, 3)", "no hidden"),
    "no-parameters": ("def f(arm):\n    return n.Identity()", "without parameters"),
    "no-function": ("f = 3", "no function"),
    "no-such-name": ("g = 3", "'f'"),
    "syntax": ("def f(:", "SyntaxError"),
}


@pytest.mark.parametrize("case", NETS)
def test_bad_factories(case: str, small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, says = NETS[case]
    module = f"bad_nets_{case.replace('-', '_')}"
    Path(f"{module}.py").write_text(f"from torch import nn as n\n{source}\n")
    line = refused(capsys, "study", "--data", str(small_npz), "--model", f"{module}:f")
    assert says in line
    assert module in line


@pytest.mark.parametrize("out", ["file", "file/under", "/proc/nowhere"])
def test_an_unwritable_folder(out: str, small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert f"--out {out}" in refused(capsys, "study", "--data", str(small_npz), "--out", out)


def test_a_study_ends_with_the_claims_and_the_three_files(small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = "a-rather-long-folder-name-which-a-narrow-terminal-would-wrap/" * 2 + "out"
    assert main(["study", "--data", str(small_npz), "--out", out, *SMALL]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in printed
    assert printed.splitlines()[-3:] == [str(Path(out, name)) for name in ("report.html", "runs.csv", "summary.json")]
    for name in ("convergence", "learning_rate", "weight_decay", "dropout", "generalization", "drift"):
        assert name in printed


def test_levels_that_are_impossible_are_printed_in_words(small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factors = ("--batch-size", "20,1", "--optimizer", "sgd,adam")
    assert main(["study", "--data", str(small_npz), "--out", "out", *SMALL, *factors]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    lines = printed.splitlines()
    assert lines[-3:] == [str(Path("out", name)) for name in ("report.html", "runs.csv", "summary.json")]
    assert lines[-4].startswith("Batch size 1 is impossible for batch: in a batch of 1")
    assert "adam" in printed


def test_json_is_all_that_goes_to_stdout(small_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--data", str(small_npz), "--out", "out", "--json", *SMALL]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed) == json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert err == ""


def test_labels_and_names_with_html_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "<script>alert(1)</script>[red]"
    Path("<b>&.csv").write_text(csv(*(row[:-1] + {"a": hostile, "b": "b", "c": "c"}[row[-1]] for row in ROWS)))
    assert main(["study", "--data", "<b>&.csv", "--out", "out", *SMALL]) == 0
    summary = json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert hostile in summary["data"]["labels"]
    assert summary["data"]["name"] == "<b>&.csv"
    assert "<script>alert(1)" not in Path("out/report.html").read_text(encoding="utf-8")
