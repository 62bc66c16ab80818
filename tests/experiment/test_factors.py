"""Batch size and optimizer as factors: what is added to a study, what it says, and that nothing else of it moves."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from batchnorm import study
from batchnorm.errors import UserError
from batchnorm.experiment.analysis.factor_results import results
from batchnorm.experiment.data.opening import load
from batchnorm.experiment.design.factors import (
    FULL,
    MOST_UPDATES,
    Factors,
    Level,
    choose_level_rates,
    design,
    own_level,
)
from batchnorm.experiment.design.plan import make_plan
from batchnorm.experiment.output.study_folder import COLUMNS
from batchnorm.experiment.study import StudyResult
from batchnorm.experiment.training.networks import Architecture
from batchnorm.experiment.training.optimizers import make_optimizer
from batchnorm.experiment.training.train import update
from tests.experiment.conftest import write_small_npz
from tests.experiment.fake_study import fake_study
from tests.experiment.test_report import Page, written

STEPS = 8
TRAIN = 36
SIX = {"convergence", "learning_rate", "weight_decay", "dropout", "generalization", "drift"}


def factor_study(data: Path, out: Path, **changes: object) -> StudyResult:
    options = {"arms": "none,group,batch", "quick": True, "lrs": "0.1,1", "steps": STEPS, "workers": 1}
    factors = {"batch_size": "full,20,8,1", "optimizer": "momentum,adamw"}
    return study(str(data), out=out, **{**options, **factors, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    folder = tmp_path_factory.mktemp("factors")
    data = write_small_npz(folder / "small.npz")
    return data, factor_study(data, folder / "out")


@pytest.fixture
def result(finished: tuple[Path, StudyResult]) -> StudyResult:
    return finished[1]


def timeless(path: Path) -> pd.DataFrame:
    return pd.read_csv(path).drop(columns="seconds")


@pytest.mark.parametrize(
    ("sizes", "names", "own"),
    [
        (None, None, (60, "sgd")),
        ((8,), ("adam",), (8, "adam")),
        ((FULL, 256, 60, 8, 1), ("adam", "sgd"), (60, "sgd")),
        ((FULL, 8), ("adam", "nesterov"), (FULL, "adam")),
        ((1, 8), None, (8, "sgd")),
    ],
)
def test_the_study_itself_runs_at_the_defaults_where_they_are_named(sizes, names, own) -> None:
    assert own_level(sizes, names) == own


def test_factors_add_runs_and_change_none(
    result: StudyResult, finished: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    plain = factor_study(finished[0], tmp_path / "plain", batch_size="full", optimizer="momentum")
    own, both = timeless(plain.runs_csv), timeless(result.runs_csv)
    assert both.iloc[: len(own)].equals(own)
    assert len(both) > len(own)
    assert tuple(pd.read_csv(result.runs_csv).columns) == COLUMNS
    assert result.summary["claims"] == plain.summary["claims"]
    assert set(result.summary["claims"]) == SIX
    assert "factors" not in plain.summary
    assert "batch_sizes" not in json.loads((plain.report.parent / "plan.json").read_text())
    # The report's own figures show the study's own runs alone.
    drawn, alone = (Page(r.report.read_text(encoding="utf-8")).figures for r in (result, plain))
    assert {name: drawn[name] for name in alone} == alone


def test_every_level_gets_its_grid_its_seeds_and_its_budget(result: StudyResult) -> None:
    runs = result.runs
    added = runs[(runs.batch_size != TRAIN) | (runs.optimizer != "momentum")]
    levels = {(20, "momentum"): 14, (8, "momentum"): 36, (1, "momentum"): MOST_UPDATES * STEPS, (TRAIN, "adamw"): STEPS}
    for (size, optimizer), steps in levels.items():
        rows = added[(added.batch_size == size) & (added.optimizer == optimizer)]
        assert set(rows.arm) == {"none", "group"} | ({"batch"} if size > 1 else set())
        assert set(rows.steps) == {steps}
        assert set(rows.weight_decay) == {0.01 if optimizer == "adamw" else 0.0}
        choose, measure = (rows[rows.purpose == purpose] for purpose in ("choose", "measure"))
        assert (choose.groupby("arm").size() == 2 * 2).all()
        assert (measure.groupby(["arm", "lr"]).size() == 2).all()
        assert not set(choose.seed) & set(measure.seed)
    assert len(added) == sum(
        (added.batch_size == size).sum() for size in {size for size, _ in levels}
    )  # and no level besides


def test_batch_normalization_at_a_batch_of_one_is_said_to_be_impossible(result: StudyResult) -> None:
    cells = {(cell["arm"], cell["level"]): cell for cell in result.summary["factors"]["cells"]}
    impossible = {key for key, cell in cells.items() if cell["impossible"]}
    assert impossible == {("batch", "1")}
    assert "no variance" in cells["batch", "1"]["impossible"]
    assert cells["group", "1"]["test_accuracy"] > 0
    text = Page(result.report.read_text(encoding="utf-8")).text
    assert "Batch size 1 is impossible for batch: in a batch of 1 some unit has a single value" in text


def test_rates_fall_with_the_batch_and_adam_has_its_own(tmp_path: Path) -> None:
    data = load(str(write_small_npz(tmp_path / "small.npz")))
    plan = make_plan("mlp", "none,layer", quick=True, batch_size=36)
    levels = design(
        plan, (36, 20, 8, 1), ("sgd", "adam"), "mlp",
        quick=True, own_lrs=False, architecture=Architecture("mlp", (4,), 3, 36), data=data,
    ).levels  # fmt: skip
    ends = {level.name: (level.lrs[0], level.lrs[-1], len(level.lrs)) for level in levels}
    assert ends.pop("full (36)") == ends.pop("20") == ends.pop("sgd") == (0.01, 100.0, 5)
    assert ends == {"8": (0.001, 10.0, 5), "1": (1e-4, 1.0, 5), "adam": (1e-5, 0.1, 5)}


@pytest.mark.parametrize(
    ("model", "arms", "impossible"),
    [
        ("mlp", "none,ghost,renorm,batch_no_affine,layer,group", {"ghost", "renorm", "batch_no_affine"}),
        ("cnn", "none,ghost,renorm,instance,batch", set()),  # a feature map of one sample has many values
    ],
)
def test_which_arms_can_take_a_batch_of_one(model: str, arms: str, impossible: set[str], tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(60, 1, 8, 8))
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(60) % 3)
    data = load(str(tmp_path / "images.npz"))
    plan = make_plan(model, arms, batch_size=20)
    architecture = Architecture(model, data.shape, data.classes, 20)
    found = design(
        plan, (20, 8, 1), (), model, quick=True, own_lrs=False, architecture=architecture, data=data
    ).impossible
    assert {(level.name, arm) for level, arm in found} == {("1", arm) for arm in impossible}


def test_a_network_that_fails_on_small_batches_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeezing_nets.py").write_text(
        "from torch import nn\n"
        "class Squeezing(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if self.training and len(x) == 1:\n"
        "            raise IndexError('no batch\\naxis')\n"
        "        return super().forward(x)\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), Squeezing(5, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = write_small_npz(tmp_path / "small.npz")
    options = {"model": "squeezing_nets:net", "arms": "none,layer", "batch_size": "20,1", "optimizer": "sgd"}
    found = factor_study(data, tmp_path / "out", **options, lrs="0.1", steps=2)
    words = {cell["impossible"] for cell in found.summary["factors"]["cells"] if cell["level"] == "1"}
    assert words == {"the network fails on a batch of 1 (IndexError: no batch axis)"}


def test_resume_runs_what_is_missing_and_refuses_other_levels(
    finished: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    data, first = finished
    out = Path(shutil.copytree(first.report.parent, tmp_path / "again"))
    wanted, lines = timeless(out / "runs.csv"), (out / "runs.csv").read_text().splitlines(keepends=True)
    (out / "runs.csv").write_text("".join(lines[:-7]))
    ages = {path.stem: path.stat().st_mtime_ns for path in (out / "traces").iterdir()}
    with pytest.raises(UserError, match="other batch_sizes"):
        factor_study(data, out, resume=True, batch_size="full,20,8")
    again = factor_study(data, out, resume=True)
    assert timeless(again.runs_csv).equals(wanted)
    rerun = {p.stem for p in (out / "traces").iterdir() if p.stat().st_mtime_ns != ages[p.stem]}
    assert rerun == set(wanted.run_id[-7:])


def test_the_command_in_the_summary_makes_the_study_again(result: StudyResult) -> None:
    assert result.summary["command"].endswith("--batch-size full,20,8,1 --optimizer momentum,adamw")


@pytest.mark.parametrize("given", [[FULL], ["full", 0], [], [2.5], 60.0, True])
def test_bad_levels_are_refused_in_python_too(given: object) -> None:
    with pytest.raises(UserError, match=r"study\(batch_size=…\)"):
        study("digits", batch_size=given)  # wrong on purpose


def _level(name: str, size: int, steps: int) -> Level:
    return Level("batch_size", name, size, "sgd", 0.0, (0.1,), steps)


def _rows(arm: str, level: Level, purpose: str, steps: list[float], accuracy: list[float]) -> list[dict[str, object]]:
    return [
        {
            "run_id": f"{arm}{level.name}{purpose}{k}", "purpose": purpose, "arm": arm, "seed": k, "lr": 0.1,
            "weight_decay": 0.0, "dropout": 0.0, "batch_size": level.batch_size, "optimizer": "sgd",
            "steps": level.steps, "steps_to_target": taken, "val_accuracy": right, "test_accuracy": right,
            "diverged": False,
        }
        for k, (taken, right) in enumerate(zip(steps, accuracy, strict=True))
    ]  # fmt: skip


def _made_up(small_steps: list[float]) -> dict[str, dict]:
    """Claims of a made-up study: an update at 60 takes 3 ms, at 8 one; twelve and five seeds of steps."""
    plan = make_plan("mlp", "none,batch", seeds=len(small_steps))
    own, small = _level("60", 60, 1000), _level("8", 8, 7500)
    generator = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for arm in plan.arms:
        for level, steps in ((own, [200, 260, 180, 240, 210][: len(small_steps)]), (small, small_steps)):
            near = generator.normal(0.95 if level is own else 0.9, 0.004, len(steps)).round(3).tolist()
            rows += _rows(arm, level, "measure", [float(s) for s in steps], near)
            rows += _rows(arm, level, "choose", [200.0, 210.0], [0.95, 0.951])
    settings = {arm: {"best_lr": 0.1, "fastest_lr": 0.1} for arm in plan.arms}
    found = results(
        plan, Factors(batch_sizes=(own, small)), pd.DataFrame(rows), settings, 0.9, 1000,
        lambda runs: {run: 0.003 if run.batch_size == 60 else 0.001 for run in runs},
    )  # fmt: skip
    json.dumps(found, allow_nan=False)
    return found["claims"]


def test_claims_agree_with_scipy_and_differ_by_what_an_update_takes() -> None:
    small = [900.0, 1200.0, 1000.0, 1500.0, 1100.0]
    claims = _made_up(small)
    log = [np.log2(values) for values in (small, [200, 260, 180, 240, 210])]
    wanted = stats.ttest_ind(*log, equal_var=False).confidence_interval(0.95)
    ratio = 2 ** (np.mean(log[0]) - np.mean(log[1]))
    for unit, price in (("updates", 1.0), ("samples", 8 / 60), ("seconds", 1 / 3)):
        claim = claims[f"batch_size=8 none {unit} against 60"]
        got = [claim[key] for key in ("ci_low", "estimate", "ci_high")]
        assert got == pytest.approx([price * 2**wanted.low, price * ratio, price * 2**wanted.high], rel=1e-9)
        assert claim["verdict"] == {"updates": "worse", "samples": "better", "seconds": "worse"}[unit]
    accuracy = claims["batch_size=8 none accuracy against 60"]
    assert (accuracy["verdict"], accuracy["unit"]) == ("worse", "points")
    assert accuracy["estimate"] == pytest.approx(-5, abs=0.6)
    assert {claim["arm"] for claim in claims.values() if "against_arm" in claim} == {"batch"}


def test_runs_that_never_arrive_are_late_and_not_absent() -> None:
    some = _made_up([900.0, 1200.0, 1000.0, 1500.0, math.nan])["batch_size=8 none updates against 60"]
    every = _made_up([900.0, 1200.0, 1000.0, 1500.0, 1100.0])["batch_size=8 none updates against 60"]
    assert some["censored"] == 1
    assert some["estimate"] > 1.2 * every["estimate"]
    assert "never there: 1 at batch size 8" in some["text"]
    none = _made_up([math.nan, math.nan])["batch_size=8 none updates against 60"]
    assert (none["estimate"], none["verdict"]) == (None, "not measurable")


def test_an_arm_that_never_arrives_is_shown_at_its_best_rate() -> None:
    plan = make_plan("mlp", "none,batch", seeds=2)
    own, small = _level("60", 60, 1000), _level("8", 8, 7500)
    rows = [
        {**row, "lr": lr}
        for arm, late in (("none", math.nan), ("batch", 300.0))
        for lr, right, steps in ((0.1, 0.9, 3 * late), (1.0, 0.5, late))
        for row in _rows(arm, small, "choose", [steps, steps + 1], [right, right + 0.001])
    ]
    chosen = choose_level_rates(Factors(batch_sizes=(own, small)), plan, pd.DataFrame(rows))
    assert chosen == {small: {"none": (0.1, 0.1), "batch": (0.1, 1.0)}}


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.0, "nesterov": False}),
        ("momentum", torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ("nesterov", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("adam", torch.optim.Adam, {"decoupled_weight_decay": False}),
        ("adamw", torch.optim.AdamW, {"decoupled_weight_decay": True}),
    ],
)
def test_an_optimizer_is_torch_s_own_and_takes_its_steps(name: str, kind: type, settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(7, 5), torch.arange(7) % 3
    twin = nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    ours = make_optimizer(name, model.parameters(), 0.1, 0.02)
    assert type(ours) is kind
    assert settings.items() <= ours.param_groups[0].items()
    shared = {key: value for key, value in settings.items() if key != "decoupled_weight_decay"}
    theirs = kind(twin.parameters(), lr=0.1, weight_decay=0.02, foreach=False, **shared)
    for _ in range(4):
        loss = update(model, ours, x, y)
        theirs.zero_grad()
        wanted = nn.functional.cross_entropy(twin(x), y)
        wanted.backward()
        theirs.step()
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    x = torch.tensor([[1.0, math.inf]])
    assert not math.isfinite(update(model, make_optimizer("adam", model.parameters(), 1.0, 0.0), x, torch.tensor([0])))
    assert torch.equal(model.weight, before)


def test_the_section_draws_every_arm_and_unit(result: StudyResult, tmp_path: Path) -> None:
    page = Page(result.report.read_text(encoding="utf-8"))
    assert "factors" in page.having("id")
    assert set(page.having("data-figure")) == set(page.figures)
    for factor in ("batch_size", "optimizer"):
        names = {f"{factor}_{arm}_{unit}" for arm in range(3) for unit in ("updates", "samples", "seconds")}
        assert {f"{factor}_overview"} | names <= set(page.figures)
    lines = [
        trace for trace in page.figures["batch_size_1_samples"]["data"] if trace.get("name") and "fill" not in trace
    ]
    last = {trace["name"]: trace["x"][-1] for trace in lines}
    assert last == {"full": STEPS * 36, "20": 14 * 20, "8": 36 * 8, "1": MOST_UPDATES * STEPS}
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    assert "factors" not in written(tmp_path, fake_study()).having("id")


def test_a_factor_section_without_traces_says_so(result: StudyResult, tmp_path: Path) -> None:
    def gone(run_id: str) -> dict:
        raise FileNotFoundError(run_id)

    page = written(tmp_path, (result.summary, result.runs, gone))
    assert "No run over these levels left a curve" in page.text
