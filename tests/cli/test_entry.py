"""The command as a process: exit codes, help and version, and a library that is not installed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import batchnorm
from batchnorm.cli import main
from tests.cli.conftest import refused
from tests.experiment.conftest import SMALL


@pytest.mark.parametrize("arguments", [(), ("blah",), ("--blah",)])
def test_bad_commands(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in refused(capsys, *arguments)


@pytest.mark.parametrize("arguments", [("--help",), ("study", "--help")])
def test_help_has_an_example(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "Example:  batchnorm study" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"batchnorm {batchnorm.__version__}\n"


def test_without_typer_the_line_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "batchnorm.cli.app", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert "batchnorm[study]" in refused(capsys, "study")


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "batchnorm", *arguments]
        return subprocess.run(
            words, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "COLUMNS": "40"}
        )

    return run


def test_the_real_process_prints_one_line_for_a_mistake(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = command("study", "--data", "missing.npz")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_real_process_finds_a_network_in_the_current_folder(
    command: Callable[..., subprocess.CompletedProcess[str]], small_npz: Path
) -> None:
    Path("my_nets.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))\n"
    )
    out = Path("out").absolute()
    done = command("study", "--data", str(small_npz), "--model", "my_nets:net", "--out", str(out), *SMALL[:-1], "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-3:] == [str(out / name) for name in ("report.html", "runs.csv", "summary.json")]
