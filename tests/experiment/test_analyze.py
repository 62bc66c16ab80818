"""Runs that others trained: the claims of a table, its reasons, its bad cells, and its readers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from batchnorm import analyze
from batchnorm.errors import UserError
from batchnorm.experiment.recorded.run_table import make_runs
from batchnorm.experiment.recorded.table_sources import read_long_table

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400)
NAMES = ["convergence", "learning_rate", "weight_decay", "dropout", "generalization", "drift"]


def drawn(rng: np.random.Generator, speeds: dict[str, float], seeds: int = 6, **settings: object) -> pd.DataFrame:
    """Curves that rise from 0.1 to 0.9, whose speed and end vary from seed to seed."""
    rows = []
    for arm, speed in speeds.items():
        for seed in range(seeds):
            rate, top = speed * math.exp(rng.normal(0, 0.25)), 0.9 + rng.normal(0, 0.01)
            curve = [0.1 + (top - 0.1) * (1 - math.exp(-step / rate)) for step in STEPS]
            for step, value in zip(STEPS, curve, strict=True):
                row = {"arm": arm, "seed": seed, "step": step, "metric": value + rng.normal(0, 0.003), **settings}
                rows += [row, {**row, "metric": row["metric"] + rng.normal(0, 0.003), "split": "test"}]
    return pd.DataFrame(rows).fillna({"split": "val"})


def test_a_plain_table_becomes_claims_and_the_three_files(tmp_path: Path) -> None:
    table = drawn(np.random.default_rng(0), {"slow": 40, "quick": 10})
    path = tmp_path / "runs of mine.csv"
    table.to_csv(path, index=False)
    result = analyze(path, tmp_path / "out", metric="accuracy")
    assert list(result.claims) == NAMES
    claim = result.claims["convergence"]
    assert claim.verdict == "better"
    assert claim.ci_low < 4 < claim.ci_high
    assert claim.n == 4  # of six seeds two choose
    assert result.claims["generalization"].n == 6  # one setting an arm: nothing was chosen
    assert {name for name, c in result.claims.items() if c.verdict == "not measurable"} == {
        "learning_rate", "weight_decay", "dropout", "drift",
    }  # fmt: skip
    assert all(c.reason for c in result.claims.values() if c.estimate is None)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary == result.summary
    assert (summary["baseline"], summary["compared"]) == ("slow", "quick")
    runs = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert len(runs) == runs.run_id.nunique() == 12
    assert runs.lr.isna().all()  # what the table does not tell stays empty
    assert set(runs.purpose) == {"choose", "measure"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Recorded runs." in page


def test_numbers_are_those_of_the_rows() -> None:
    rows = [
        {"arm": arm, "seed": seed, "step": step, "metric": value, "split": split, "lr": 0.1}
        for arm in "ab" for seed in (1, 2)
        for split, values in (("val", {0: 0.1, 10: 0.8, 20: 0.7}), ("test", {0: 0.2, 8: 0.6, 12: 0.9}))
        for step, value in values.items()
    ]  # fmt: skip
    runs = make_runs(read_long_table(rows), *_accuracy())
    row = runs.scores.iloc[0]
    assert (row.val_accuracy, row.final_val_accuracy) == (0.8, 0.7)
    assert row.test_accuracy == 0.6  # the last test row at or before the best validation step
    assert row.steps == 20 == runs.budget
    val = [row for row in rows if row["split"] == "val"]
    assert make_runs(read_long_table(val), *_accuracy()).scores.iloc[0].test_accuracy == 0.7  # the last, not the best


def _accuracy() -> tuple:
    from batchnorm.experiment.analysis.metric import Metric

    return Metric(), None


def test_a_loss_is_better_when_it_is_less(tmp_path: Path) -> None:
    table = drawn(np.random.default_rng(1), {"slow": 40, "quick": 10})
    loss = table.assign(metric=5 - 4 * table["metric"])
    first = analyze(table, tmp_path / "a").claims
    second = analyze(loss, tmp_path / "b", metric="loss", direction="min").claims
    assert second["convergence"].verdict == first["convergence"].verdict == "better"
    assert second["generalization"].estimate == pytest.approx(4 * first["generalization"].estimate / 100, rel=0.01)
    assert second["generalization"].unit == "loss"
    worse = analyze(loss, tmp_path / "c", metric="loss").claims  # were more of it better, nothing is ever learnt
    assert worse["convergence"].verdict != "better"


@pytest.mark.parametrize("seeds", [4, 8])
def test_equal_arms_are_rarely_told_apart(seeds: int, tmp_path: Path) -> None:
    rng, wrong, trials = np.random.default_rng(seeds), Counter(), 40
    for _ in range(trials):
        table = drawn(rng, {"a": 20, "b": 20}, seeds)
        claims = _claims_without_files(table, tmp_path)
        wrong.update(name for name, claim in claims.items() if claim.verdict in ("better", "worse"))
    assert max(wrong.values(), default=0) <= 6  # 5 % of 40 is two; six or fewer in 99.7 % of cases


def _claims_without_files(table: pd.DataFrame, tmp_path: Path, monkeypatch: object = None) -> dict:
    from batchnorm.experiment import analyze as module

    report, module.write_report = module.write_report, lambda *arguments: None
    try:
        return analyze(table, tmp_path / "drawn").claims
    finally:
        module.write_report = report


def test_rates_and_settings_are_chosen_by_seeds_that_do_not_measure(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    parts = [
        drawn(rng, {"a": 20 / lr, "b": 10 / lr}, lr=lr, weight_decay=wd, width=width)
        for lr, wd, width in ((0.1, 0, 8), (1, 0, 8), (1, 0.01, 8), (1, 0, 16))
    ]
    result = analyze(pd.concat(parts), tmp_path / "out")
    for name in ("convergence", "learning_rate", "weight_decay", "generalization"):
        assert result.claims[name].estimate is not None, name
    assert result.claims["generalization"].n == 4
    assert result.claims["dropout"].reason.startswith("a has one value of dropout")
    assert result.summary["base"] == {"weight_decay": 0.0, "width": "8"}
    assert set(result.summary["settings"]["b"]) == {"best_lr", "fastest_lr", "lr", "weight_decay", "width"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'data-figure="weight_decay"' in page
    assert 'data-figure="rates"' in page


def test_two_seeds_cannot_choose(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    table = pd.concat([drawn(rng, {"a": 20, "b": 10}, 2, lr=lr) for lr in (0.1, 1)])
    claims = analyze(table, tmp_path / "out").claims
    assert claims["generalization"].reason.startswith("fewer than three seeds an arm")
    single = drawn(rng, {"a": 40, "b": 4}, 2)
    alone = analyze(single, tmp_path / "one").claims
    assert alone["convergence"].reason.startswith("no target, fewer than three seeds")
    assert alone["generalization"].n == 2
    told = analyze(single, tmp_path / "told", target=0.7).claims["convergence"]
    assert told.verdict == "better"


def test_an_arm_that_was_never_at_the_base_is_not_measurable_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    table = pd.concat([drawn(rng, {"a": 20}, weight_decay=0), drawn(rng, {"b": 20}, weight_decay=0.01)])
    claims = analyze(table, tmp_path / "out").claims
    assert claims["convergence"].reason == "no target, b has no run at the level at which the others are compared" or (
        claims["convergence"].reason == "fewer than two seeds measured an arm at its best rate"
    )
    assert claims["generalization"].estimate is not None  # each at its chosen setting


def test_a_run_that_is_not_finite_has_diverged_and_counts_as_chance(tmp_path: Path) -> None:
    table = drawn(np.random.default_rng(6), {"a": 20, "b": 10})
    broken = (table["arm"] == "b") & (table["seed"] == 5) & (table["step"] >= 10)
    table.loc[broken, "metric"] = np.nan
    runs = analyze(table, tmp_path / "out", chance=0.125).runs
    assert runs["diverged"].sum() == 1
    assert runs.loc[runs["diverged"], "val_accuracy"].tolist() == [0.125]
    again = analyze(table, tmp_path / "out").runs  # an analysis may replace an analysis
    assert 0.08 < again.loc[again["diverged"], "val_accuracy"].item() < 0.12  # its own first value


def test_several_arms_are_compared_with_the_first(tmp_path: Path) -> None:
    table = drawn(np.random.default_rng(7), {"base": 30, "same": 30, "slow": 120, "quick": 8})
    result = analyze(table, tmp_path / "out", target=0.7)
    entries = result.summary["comparisons"]["convergence"]
    assert [entry["arm"] for entry in entries] == ["quick", "same", "slow"]
    assert [entry["verdict"] for entry in entries] == ["better", "no difference", "worse"]
    assert "All arms against base" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_target_exceeds_what_is_untrained(tmp_path: Path) -> None:
    still = drawn(np.random.default_rng(9), {"a": 1e5, "b": 20})  # the baseline has not begun to learn
    reason = analyze(still, tmp_path / "out").claims["convergence"].reason
    assert reason.startswith("no target, a attains 10")
    assert "untrained is 10." in reason
    above = analyze(drawn(np.random.default_rng(9), {"a": 40, "b": 10}), tmp_path / "out", chance=0.95)
    assert above.claims["convergence"].verdict == "not measurable"


def test_the_example_of_an_own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.study import own_loop

    monkeypatch.setattr(own_loop, "STEPS", 30)
    result = own_loop.main(tmp_path)
    assert len(result.runs) == 8
    assert result.claims["generalization"].verdict == "better"
    assert result.claims["generalization"].n == 4


GOOD = [{"arm": arm, "seed": seed, "step": step, "metric": 0.5} for arm in "ab" for seed in (0, 1) for step in (0, 9)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop(columns="step"), r"no column step, .*found: arm, seed, metric"),
        (lambda t: t.drop(columns=["arm", "metric"]), "no column arm, metric"),
        (lambda t: t.iloc[:0], "no rows"),
        (lambda t: t[t["arm"] == "a"], "a single arm 'a'"),
        (lambda t: t.assign(arm=["", *t["arm"][1:]]), "no arm in row 1"),
        (lambda t: t.assign(seed=["0", "x", *t["seed"][2:]]), "seed is 'x' in row 2"),
        (lambda t: t.assign(seed=[0.5, *t["seed"][1:]]), "seed is '0.5' in row 1"),
        (lambda t: t.assign(step=[-1, *t["step"][1:]]), "step is '-1' in row 1"),
        (lambda t: t.assign(metric=[*t["metric"][:-1].astype(str), "high"]), "metric is 'high' in row 8"),
        (lambda t: t.assign(metric=[*t["metric"][:-1].astype(str), ""]), "metric is '' in row 8"),
        (lambda t: t.assign(split="train"), "split 'train' in row 1"),
        (lambda t: t.assign(lr=[0, *[1] * 7]), "lr is 0 in row 1"),
        (lambda t: t.assign(lr="big"), "lr is 'big' in row 1"),
        (lambda t: t.assign(purpose="both"), "purpose 'both' in row 1"),
        (lambda t: t.assign(seed=0), "a second value of arm 'a', seed 0, step 0 in row 3"),
        (lambda t: t.assign(time=range(8)), "'time' changes"),
        (lambda t: 3, "a int is no table"),
        (lambda t: [1, 2], "rows of int"),
    ],
)  # fmt: skip
def test_a_bad_table_is_one_line_and_writes_nothing(change: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        analyze(change(pd.DataFrame(GOOD)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_an_analysis_has_not_written_is_never_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "runs.csv"
    pd.DataFrame(GOOD).to_csv(mine, index=False)
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"runs\.csv is there and of no analysis"):
        analyze(mine, tmp_path)
    assert mine.read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        analyze(mine, mine / "under")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    table = drawn(np.random.default_rng(8), {hostile: 40, "../../b": 10, "c": 3})
    analyze(table, tmp_path / "out", metric="</script><b>")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "<b>" not in page.split("figures")[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "runs.csv", "summary.json"]


def test_a_folder_of_tables_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for arm, part in pd.DataFrame(GOOD).groupby("arm"):
        part.to_csv(folder / f"{arm}.csv", index=False)
    assert read_long_table(folder).arms == ("a", "b")
    (folder / "a.csv").unlink()
    (folder / "b.csv").unlink()
    with pytest.raises(UserError, match="no runs in this folder"):
        read_long_table(folder)


def test_tensorboard_folders(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra: pip install 'batchnorm[tensorboard]'")
    from torch.utils.tensorboard import SummaryWriter

    for arm in ("none", "batch"):
        for seed in (0, 1):
            with SummaryWriter(str(tmp_path / f"arm={arm}" / f"seed={seed},lr=0.1")) as writer:
                for step in (0, 10):
                    writer.add_scalar("val/accuracy", seed + step / 100, step, new_style=step > 0)
                    writer.add_scalar("test/accuracy", step / 100, step)
                    writer.add_scalar("train/loss", 1.0, step)
    table = read_long_table(tmp_path)
    assert set(table.arms) == {"none", "batch"}
    assert table.settings == ("lr",)
    rows = table.rows[(table.rows["seed"] == 1) & (table.rows["arm"] == "batch")]
    assert rows[["step", "split", "metric"]].to_numpy().tolist() == [
        [0, "val", 1.0], [10, "val", pytest.approx(1.1)], [0, "test", 0.0], [10, "test", pytest.approx(0.1)],
    ]  # fmt: skip
    with SummaryWriter(str(tmp_path / "arm=x")) as writer:
        writer.add_scalar("val/accuracy", 1.0, 0)
    with pytest.raises(UserError, match="no seed of run arm=x"):
        read_long_table(tmp_path)


def test_mlflow_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow", reason="an extra: pip install 'batchnorm[mlflow]'")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.create_experiment("mine")
    for arm in ("none", "batch"):
        for seed in (0, 1):
            run = client.create_run(experiment).info.run_id
            for name, value in (("arm", arm), ("seed", seed), ("lr", 0.1)):
                client.log_param(run, name, value)
            for step in (0, 10):
                client.log_metric(run, "val_acc", seed + step / 100, step=step)
            client.set_terminated(run)
    table = read_long_table(tmp_path / "mlruns")
    assert table.arms == ("none", "batch")
    assert len(table.rows) == 8
    other = client.create_run(experiment).info.run_id
    client.log_metric(other, "f1", 1.0)
    client.set_terminated(other)
    with pytest.raises(UserError, match="no metric"):
        read_long_table(tmp_path / "mlruns")
