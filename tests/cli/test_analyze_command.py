"""`batchnorm analyze` as a user meets it: one line for a mistake, the claims and the three files at the end."""

import json
from pathlib import Path

import pytest

from batchnorm import StudyRecorder
from batchnorm.cli import main
from tests.cli.conftest import refused


def _record(path: str) -> None:
    for arm, speed in (("plain", 1), ("mid", 2), ("fancy", 5)):
        for seed in range(4):
            with StudyRecorder(path, arm=arm, seed=seed) as recorder:
                for step in (0, 10, 20, 40, 80):
                    recorder.log(step, 1 - 1 / (1 + speed * step * (1 + seed / 20)))


def test_recorded_runs_end_as_claims_and_the_three_files(capsys: pytest.CaptureFixture[str]) -> None:
    _record("runs.csv")
    assert main(["analyze", "runs.csv", "--out", "out", "--target", "0.9", "--metric", "accuracy"]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    assert "fancy against plain" in printed
    assert "all arms against plain" in printed
    assert "not measurable" in printed
    assert printed.splitlines()[-3:] == [str(Path("out", name)) for name in ("report.html", "runs.csv", "summary.json")]


def test_json_is_all_that_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    _record("runs.csv")
    assert main(["analyze", "runs.csv", "--out", "out", "--json"]) == 0
    printed, err = capsys.readouterr()
    assert json.loads(printed) == json.loads(Path("out/summary.json").read_text(encoding="utf-8"))
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("missing.csv",), "analyze missing.csv"),
        (("runs.csv", "--direction", "up"), "--direction"),
        (("runs.csv", "--target", "high"), "--target"),
        (("runs.csv", "--out", "."), "--out ."),
        (("wide.csv",), "no column step, metric"),
        (("empty",), "no runs in this folder"),
        (("binary.csv",), "binary.csv"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    _record("runs.csv")
    Path("wide.csv").write_text("arm,seed,accuracy\na,0,0.5\n")
    Path("binary.csv").write_bytes(bytes(range(256)) * 9)
    Path("empty").mkdir()
    assert says in refused(capsys, "analyze", *arguments)
