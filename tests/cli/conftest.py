"""What every test of the command line starts with: an empty folder, and a small data set in it."""

import sys
from pathlib import Path

import pytest

from batchnorm.cli import main
from tests.experiment.conftest import write_small_npz


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def small_npz(tmp_path: Path) -> Path:
    return write_small_npz(tmp_path / "small.npz")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Returns the one line on stderr of a call that must end with exit code 2 and print nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("batchnorm: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.isprintable() or err[:-1].isprintable()
    assert err.count(", ") >= 2, "WHAT, WHERE, WHAT TO DO"
    return err
