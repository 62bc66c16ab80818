"""What TensorBoard and MLflow read back is what runs.csv and the traces say, once, whatever interrupted the study."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from batchnorm import study
from batchnorm.cli import main
from batchnorm.errors import UserError
from batchnorm.experiment.logs.all_logs import RunLogs
from batchnorm.experiment.logs.mlflow import MlflowLog
from batchnorm.experiment.output.study_folder import Record
from tests.experiment.conftest import SMALL, write_small_npz

OPTIONS: dict[str, Any] = {"quick": True, "lrs": "0.1,1", "steps": 8, "workers": 1}
PARAMETERS = ("purpose", "arm", "seed", "lr", "weight_decay", "dropout", "batch_size", "optimizer", "steps")
FINALS = ("val_accuracy", "test_accuracy", "final_val_accuracy", "train_loss", "drift", "diverged", "seconds")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study resumed until both logs are whole: rows were lost after they were logged, and MLflow runs cut short."""
    folder = tmp_path_factory.mktemp("logged")
    data, out = write_small_npz(folder / "small.npz"), folder / "out"
    study(str(data), out=out, log="mlflow", **OPTIONS)
    log = MlflowLog(Record(out))
    log.open()
    first, second, *_ = log._held.values()
    log._client.delete_run(first.info.run_id)
    log._client.update_run(second.info.run_id, status="RUNNING")
    lines = (out / "runs.csv").read_text().splitlines(keepends=True)
    (out / "runs.csv").write_text("".join(lines[:-6]))
    for _ in range(2):
        study(str(data), out=out, log=[" mlflow", "tensorboard"], resume=True, **OPTIONS)
    return out


def rows_of(out: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields each run's row and trace, read without the library."""
    for row in pd.read_csv(out / "runs.csv").to_dict("records"):
        yield row, json.loads((out / "traces" / f"{row['run_id']}.json").read_text())


def curve(trace: dict[str, Any], name: str) -> list[tuple[int, float]]:
    pairs = zip(trace["steps"], trace[name], strict=True)
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs if value is not None]


def finals(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics that the row has, as far as float32 (TensorBoard's) carries them."""
    return {n: pytest.approx(float(row[n]), rel=1e-6) for n in (*FINALS, "steps_to_target") if not pd.isna(row[n])}


def test_tensorboard_holds_every_run_once(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    runs = list(rows_of(logged))
    assert {path.name for path in (logged / "tensorboard").iterdir()} == {row["run_id"] for row, _ in runs}
    for row, trace in runs:
        events = EventAccumulator(str(logged / "tensorboard" / row["run_id"])).Reload()
        for name in ("val_accuracy", "train_loss"):
            assert [(e.step, e.value) for e in events.Scalars(f"curve/{name}")] == curve(trace, name)
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if not tag.startswith("curve/")}
        assert {tag: [e.value for e in values] for tag, values in scalars.items()} == {
            tag: [value] for tag, value in finals(row).items()
        }
        start = HParamsPluginData.FromString(
            events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        ).session_start_info
        found = {k: v.string_value if v.HasField("string_value") else v.number_value for k, v in start.hparams.items()}
        assert found == {name: row[name] for name in PARAMETERS}


def test_mlflow_holds_every_run_once(logged: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient((logged / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("batchnorm study out")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    runs = list(rows_of(logged))
    assert len(client.search_runs([experiment.experiment_id])) == len(found) == len(runs)
    for row, _ in runs:
        run = found[row["run_id"]]
        assert run.info.status == "FINISHED"
        metrics = {name: value for name, value in run.data.metrics.items() if not name.startswith("curve/")}
        assert metrics == finals(row)
        assert run.data.params == {name: str(row[name]) for name in PARAMETERS}
        for name in metrics:
            assert len(client.get_metric_history(run.info.run_id, name)) == 1, name
    _, trace = runs[-1]
    for name in ("val_accuracy", "train_loss"):  # of the last run: a file is read for each
        history = client.get_metric_history(run.info.run_id, f"curve/{name}")
        assert [(point.step, point.value) for point in history] == curve(trace, name)


def test_in_a_shared_store_each_study_has_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "shared").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    row, trace = next(rows_of(logged))
    for name, seconds in (("a", 1.25), ("a", 1.25), ("b", 1.5), ("b", 1.75)):  # new, resumed, another, trained again
        record = Record(tmp_path / name)
        record.begin({"steps": 8}, resume=True)
        log = MlflowLog(record)
        log.open()
        if not log.holds({**row, "seconds": seconds}):
            log.add({**row, "seconds": seconds}, trace)
    found = log._client.search_runs([log._experiment])
    assert sorted(run.data.metrics["seconds"] for run in found) == [1.25, 1.75]
    assert not (tmp_path / "a" / "mlruns").exists()


@pytest.mark.parametrize(("log", "place"), [("tensorboard", "tensorboard"), ("mlflow", "mlruns")])
def test_a_log_that_cannot_be_written(
    log: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_small_npz(tmp_path / "small.npz")
    out = tmp_path / "out"
    out.mkdir()
    (out / place).write_text("a file where the folder should be")
    command = ["study", "--data", "small.npz", "--out", str(out), *SMALL, "--log", log]
    assert main(command) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert f"the log cannot be written (FileExistsError: [Errno 17] File exists: '{out / place}'), {out / place}" in err


def test_unknown_and_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"unknown log 'wandb', study\(log=…\), give some of tensorboard, mlflow"):
        study(log="tensorboard,wandb")
    for name in ("tensorboard", "mlflow"):
        monkeypatch.delitem(sys.modules, f"batchnorm.experiment.logs.{name}", raising=False)
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        assert main(["study", "--log", name]) == 2
        assert f"batchnorm[{name}]" in capsys.readouterr().err
    assert not Path("study").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` command")
    if done.returncode:
        pytest.skip(f"this machine allows no mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=20)


def test_a_full_disk(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "out"
    data = write_small_npz(tmp_path / "small.npz")
    command = ["study", "--data", str(data), "--out", str(out), *SMALL]
    assert main(command) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "No space left" in err
    assert f"--out {out}, make room and continue with --resume" in err
    kept = set(Record(out).read_rows())
    assert 0 < len(kept) < 40
    ages = {path.stem: path.stat().st_mtime_ns for path in (out / "traces").iterdir() if path.stem in kept}
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True, timeout=20)
    assert main([*command, "--resume"]) == 0
    assert ages == {stem: (out / "traces" / f"{stem}.json").stat().st_mtime_ns for stem in ages}, "finished runs stay"
    assert pd.read_csv(out / "runs.csv").run_id.nunique() == 40


@pytest.mark.parametrize(("log", "place"), [("tensorboard", "tensorboard"), ("mlflow", "mlruns")])
def test_a_log_on_a_full_disk(
    log: str, place: str, small_disk: Path, tmp_path: Path, logged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "out")
    record.begin({"steps": 8}, resume=False)
    runs = list(rows_of(logged))
    for row, trace in runs:
        record.add(row, trace)
    (record.folder / place).symlink_to(small_disk)
    rows = [row for row, _ in runs]
    with pytest.raises(UserError, match=rf"the log cannot be written \(.*No space left.*/out/{place}, make room"):
        RunLogs(log, record).catch_up(rows)
    assert capfd.readouterr() == ("", "")
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True, timeout=20)
    again = RunLogs(log, record)
    again.catch_up(rows)
    assert all(again._logs[0].holds(row) for row in rows)
