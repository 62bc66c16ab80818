"""Whole studies on small data: what is on disk, determinism, resuming, and refusing to lose results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from batchnorm import study
from batchnorm.errors import UserError
from batchnorm.experiment.analysis.target import steps_to
from batchnorm.experiment.design.plan import make_plan
from batchnorm.experiment.output.study_folder import COLUMNS, Record
from batchnorm.experiment.study import StudyResult
from tests.experiment.conftest import SMALL, write_small_npz

OPTIONS = {"quick": True, "lrs": "0.1,1", "steps": 8, "workers": 1}


def small_study(data: Path, out: Path, **changes: object) -> StudyResult:
    return study(str(data), out=out, **{**OPTIONS, **changes})


@pytest.fixture(scope="module")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("finished")
    data = write_small_npz(folder / "small.npz")
    small_study(data, folder / "out")
    return data, folder / "out"


@pytest.fixture
def finished(_finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A finished study's data and a copy of its folder, file times kept."""
    data, out = _finished
    return data, Path(shutil.copytree(out, tmp_path / "finished"))


def timeless(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).drop(columns="seconds")


def test_a_study_leaves_its_three_files_and_every_trace(finished: tuple[Path, Path]) -> None:
    _, out = finished
    runs = pd.read_csv(out / "runs.csv")
    assert tuple(runs.columns) == COLUMNS
    assert len(runs) == runs.run_id.nunique() == len(make_plan("mlp", "none,batch", quick=True, lrs="0.1,1"))
    assert {path.stem for path in (out / "traces").iterdir()} == set(runs.run_id)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    claims = {"convergence", "learning_rate", "weight_decay", "dropout", "generalization", "drift"}
    assert set(summary["claims"]) == claims
    assert summary["runs"] == len(runs)
    assert (out / "report.html").stat().st_size > 10_000


def test_arms_get_the_same_budget_and_no_setting_is_run_twice(small_npz: Path, tmp_path: Path) -> None:
    runs = small_study(small_npz, tmp_path / "out", arms="none,layer,batch").runs
    assert runs.groupby("arm").size().nunique() == 1
    assert not runs.duplicated(["arm", "seed", "lr", "weight_decay", "dropout"]).any()
    seeds = {purpose: set(group.seed) for purpose, group in runs.groupby("purpose")}
    assert not seeds["choose"] & seeds["measure"]
    assert min(map(len, seeds.values())) >= 2


def test_one_worker_and_two_give_the_same_runs(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, out = finished
    two = small_study(data, tmp_path / "two", workers=2)
    assert timeless(two.runs_csv).equals(timeless(out / "runs.csv"))


def test_resume_runs_exactly_what_is_missing(finished: tuple[Path, Path]) -> None:
    data, out = finished
    wanted, lines = timeless(out / "runs.csv"), (out / "runs.csv").read_text().splitlines(keepends=True)
    # Most rows, an orphan's double, a row whose trace is lost, and a last one cut short by a power failure.
    (out / "runs.csv").write_text("".join([*lines[:-4], lines[1], lines[-1][:40]]))
    (out / "traces" / f"{wanted.run_id[5]}.json").unlink()
    ages = {path.stem: path.stat().st_mtime_ns for path in (out / "traces").iterdir()}
    again = small_study(data, out, resume=True)
    assert timeless(again.runs_csv).equals(wanted)
    rerun = {p.stem for p in (out / "traces").iterdir() if p.stat().st_mtime_ns != ages.get(p.stem)}
    assert rerun == {wanted.run_id[5], *wanted.run_id[-4:]}


def test_a_study_is_never_overwritten(finished: tuple[Path, Path]) -> None:
    data, out = finished
    before = (out / "runs.csv").read_bytes()
    with pytest.raises(UserError, match=r"study\(resume=True\) or give another folder"):
        small_study(data, out)
    with pytest.raises(UserError, match="other steps"):
        small_study(data, out, resume=True, steps=13)
    with pytest.raises(UserError, match=r"other .*arms"):
        small_study(data, out, resume=True, arms="none,layer")
    assert (out / "runs.csv").read_bytes() == before


def test_a_study_that_finished_no_run_may_be_replaced(tmp_path: Path) -> None:
    record = Record(tmp_path / "out")
    record.begin({"steps": 1}, resume=False)
    assert record.begin({"steps": 2}, resume=False) == []
    assert record.begin({"steps": 2}, resume=True) == []


@pytest.mark.timeout(120)
def test_a_killed_study_goes_on_where_it_was(small_npz: Path, tmp_path: Path, finished: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "batchnorm", "study", "--data", str(small_npz), "--out", str(out), *SMALL]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _wait_for_rows(out / "runs.csv", 5, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = {line.partition(",")[0] for line in (out / "runs.csv").read_text().splitlines()[1:]}
    ages = {path.stem: path.stat().st_mtime_ns for path in (out / "traces").glob("*.json") if path.stem in done}
    small_study(small_npz, out, resume=True)
    assert timeless(out / "runs.csv").equals(timeless(finished[1] / "runs.csv"))
    assert ages == {stem: (out / "traces" / f"{stem}.json").stat().st_mtime_ns for stem in ages}


@pytest.mark.timeout(120)
def test_ctrl_c_says_how_to_go_on(small_npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "batchnorm", "study", "--data", str(small_npz), "--out", str(out), *SMALL]
    command[command.index("--workers") + 1] = "2"
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    _wait_for_rows(out / "runs.csv", 3, started)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to the whole process group
    _, said = started.communicate(timeout=60)
    assert started.returncode == 130
    assert said.decode().count("\n") == 1
    assert "--resume" in said.decode()


def _wait_for_rows(path: Path, rows: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > rows):
        time.sleep(0.01)
    assert process.poll() is None, "the study ended before it could be interrupted"


def test_steps_to_the_target_lie_between_evaluations() -> None:
    trace = {"steps": [0, 10, 20], "val_accuracy": [0.1, 0.5, 0.9]}
    assert steps_to(0.5, trace) == 10
    assert steps_to(0.7, trace) == 15
    assert steps_to(0.1, trace) == 0
    assert steps_to(0.95, trace) is None
    assert steps_to(None, trace) is None


def test_a_factory_failing_in_a_worker_is_one_sentence(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_nets.py").write_text(
        "from torch import nn\n"
        "class Late(nn.Sequential):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += self.training\n"
        "        if self.calls > 3:\n"
        "            raise RuntimeError('late\\nboom')\n"
        "        return super().forward(x)\n"
        "def late():\n"
        "    return Late(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"training fails \(RuntimeError: late boom\).*late_nets:late"):
            small_study(small_npz, tmp_path / f"out{workers}", model="late_nets:late", workers=workers)
