"""The recorder: whole runs only, several processes on one path, and one line for what cannot be recorded."""

from __future__ import annotations

import csv
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import StudyRecorder, recorder_for_lightning, recorder_for_transformers
from batchnorm.errors import UserError


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_s_rows_appear_when_its_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.csv"
    with StudyRecorder(path, arm="batch", seed=3, lr=0.1) as recorder:
        recorder.log(0, 0.1)
        recorder.log(10, torch.tensor(0.5))
        recorder.log(10, 0.625, split="test")
        recorder.log(10, 0.75)  # the last value of a step counts
        assert not path.exists()
    assert rows_of(path) == [
        {"arm": "batch", "seed": "3", "step": "0", "metric": "0.1", "split": "val", "lr": "0.1"},
        {"arm": "batch", "seed": "3", "step": "10", "metric": "0.75", "split": "val", "lr": "0.1"},
        {"arm": "batch", "seed": "3", "step": "10", "metric": "0.625", "split": "test", "lr": "0.1"},
    ]


def test_a_run_that_fails_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    failing = StudyRecorder(path, arm="a", seed=0)
    failing.__enter__().log(0, 1.0)
    failing.__exit__(RuntimeError, RuntimeError(), None)
    assert not path.exists()
    with StudyRecorder(path, arm="a", seed=0) as recorder:
        recorder.log(0, 1.0)
    assert len(rows_of(path)) == 1


def test_a_run_that_is_there_is_refused_before_it_trains(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    with StudyRecorder(path, arm="a", seed=0, lr=1.0) as recorder:
        recorder.log(0, 1.0)
    with pytest.raises(UserError, match=r"arm a, seed 0, lr 1\.0 is there already"):
        StudyRecorder(path, arm="a", seed=0, lr=1.0).__enter__()
    for other in ({"seed": 1, "lr": 1.0}, {"seed": 0, "lr": 2.0}, {"seed": 0}, {"seed": 0, "lr": 1.0, "width": 8}):
        with StudyRecorder(path, arm="a", **other) as recorder:
            recorder.log(0, 1.0)
    assert len(rows_of(path)) == 5


def test_a_setting_that_earlier_runs_had_not_is_a_new_column(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    for settings in ({}, {"width": 8}, {"name": 'a, "b"'}):
        with StudyRecorder(path, arm="a", seed=0, **settings) as recorder:
            recorder.log(0, 1.0)
    found = [(row["width"], row["name"]) for row in rows_of(path)]
    assert found == [("", ""), ("8", ""), ("", 'a, "b"')]


def _record(path: Path, seeds: range) -> None:
    for seed in seeds:
        # Each process brings a column of its own, so that the whole file is rewritten under the others' hands.
        with StudyRecorder(path, arm="a", seed=seed, **{f"x{seeds.start}": 1}) as recorder:
            for step in range(50):
                recorder.log(step, seed + step / 100)


def test_processes_write_to_one_path(tmp_path: Path) -> None:
    path, context = tmp_path / "runs.csv", multiprocessing.get_context("fork")
    processes = [context.Process(target=_record, args=(path, range(k, k + 10))) for k in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    rows = rows_of(path)
    assert len(rows) == 30 * 50
    assert {(row["seed"], row["step"]) for row in rows} == {(str(s), str(t)) for s in range(30) for t in range(50)}
    assert all(float(row["metric"]) == int(row["seed"]) + int(row["step"]) / 100 for row in rows)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"arm": " ", "seed": 0}, "empty arm"),
        ({"arm": "a", "seed": -1}, "seed -1"),
        ({"arm": "a", "seed": 0.5}, "seed 0.5"),
        ({"arm": "a", "seed": 0, "lr": "high"}, "lr is 'high'"),
        ({"arm": "a", "seed": 0, "metric": 1}, "a setting named metric"),
    ],
)
def test_bad_runs_are_refused_in_one_line(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        StudyRecorder(tmp_path / "runs.csv", **options)


def test_bad_values_and_files_are_refused_in_one_line(tmp_path: Path) -> None:
    recorder = StudyRecorder(tmp_path / "runs.csv", arm="a", seed=0)
    for arguments, says in (((-1, 0.0), "step -1"), ((0, "x"), "'x'"), ((0, 1.0, "train"), "'train'")):
        with pytest.raises(UserError, match=says):
            recorder.log(*arguments)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no column arm"):
        StudyRecorder(tmp_path / "other.csv", arm="a", seed=0).__enter__()
    with pytest.raises(UserError, match="cannot be written"):
        StudyRecorder(tmp_path / "other.csv" / "runs.csv", arm="a", seed=0).__enter__()


@pytest.mark.filterwarnings("ignore")  # the trainer's own: few workers, no GPU, no logger
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="installed for development by the Makefile")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def test_step(self, batch, index):
            self.log("test_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(torch.randn(12, 4), torch.arange(12) % 2), batch_size=4)
    path = tmp_path / "runs.csv"
    callback = recorder_for_lightning(StudyRecorder(path, arm="plain", seed=0), test="test_acc")
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
    )  # fmt: skip
    module = Classifier()
    trainer.fit(module, data, data)
    assert not path.exists()
    trainer.test(module, data, verbose=False)
    rows = rows_of(path)
    assert [(row["step"], row["split"]) for row in rows] == [("3", "val"), ("6", "val"), ("6", "test")]
    assert rows[1]["metric"] == rows[2]["metric"]  # the same samples, after the same step
    wrong = recorder_for_lightning(StudyRecorder(path, arm="plain", seed=1), monitor="val_f1")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[wrong],
    )  # fmt: skip
    with pytest.raises(UserError, match="no metric 'val_f1' among those logged"):
        trainer.fit(Classifier(), data, data)


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="a development dependency: pip install 'batchnorm[dev]'")
    path = tmp_path / "runs.csv"
    callback = recorder_for_transformers(StudyRecorder(path, arm="plain", seed=0))
    assert isinstance(callback, transformers.TrainerCallback)
    # The Trainer itself asks for accelerate, which nothing else here uses: its calls, by its own types.
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    callback.on_train_begin(None, state, control, model=None)
    for state.global_step, value in ((5, 0.5), (10, 0.75)):
        callback.on_evaluate(None, state, control, metrics={"eval_accuracy": value, "eval_loss": 1.0})
    callback.on_train_end(None, state, control, model=None)
    assert [(row["step"], row["metric"]) for row in rows_of(path)] == [("5", "0.5"), ("10", "0.75")]
    with pytest.raises(UserError, match=r"no metric 'eval_accuracy' among those logged \(eval_loss\)"):
        callback.on_evaluate(None, state, control, metrics={"eval_loss": 1.0})
