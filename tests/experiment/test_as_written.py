"""The network as its author wrote it: arms in the places of its own normalizations, its settings and dropout kept."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import study
from batchnorm.errors import UserError
from batchnorm.experiment.data.opening import load
from batchnorm.experiment.design.prepare import tree_lines
from batchnorm.experiment.training.arms import ARMS, DynamicTanh, RmsOfSample
from batchnorm.experiment.training.networks import Architecture, make_arm
from batchnorm.experiment.training.places import LastAxis
from batchnorm.experiment.training.runs import Run
from batchnorm.experiment.training.train import train

BATCH = nn.modules.batchnorm._BatchNorm


def convolutions() -> nn.Sequential:
    """One convolution of two is normalized, with settings of its own; the bias before it was left out by hand."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, eps=0.01, momentum=0.3, affine=False)
    body = [nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 4, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * 16, 2))


X = torch.randn(5, 3, 8, 8)


def arm_of(model: nn.Module, arm: str, x: torch.Tensor = X, where: str = "same") -> nn.Module:
    return make_arm(model, arm, x, 20, "net", where)


def test_as_written_is_the_network_itself() -> None:
    for where in ("same", "every"):
        model = convolutions()
        before = copy.deepcopy(model)
        after = arm_of(model, "as_written", where=where)
        assert after is model
        assert str(after) == str(before)
        assert all(
            torch.equal(a, b) for a, b in zip(after.state_dict().values(), before.state_dict().values(), strict=True)
        )


def test_batch_in_the_same_places_is_the_network_as_written() -> None:
    model = convolutions()
    written = str(model)
    assert str(arm_of(model, "batch")) == written


@pytest.mark.parametrize("arm", ["without", "none"])
def test_without_takes_each_out_where_it_stands_and_gives_the_bias_back(arm: str) -> None:
    model = arm_of(convolutions(), arm)
    assert not [m for m in model.modules() if isinstance(m, BATCH)]
    assert model[0].bias is not None
    assert model[3].p == 0.3
    assert torch.equal(model[0].weight, convolutions()[0].weight)


@pytest.mark.parametrize(
    ("arm", "kind"),
    [
        ("group", nn.GroupNorm), ("layer", nn.GroupNorm), ("instance", nn.InstanceNorm2d), ("rms", RmsOfSample),
        ("dyt", DynamicTanh), ("ghost", BATCH), ("renorm", BATCH), ("batch_no_affine", BATCH),
    ],
)  # fmt: skip
def test_another_arm_stands_in_the_same_place_with_the_same_settings(arm: str, kind: type[nn.Module]) -> None:
    model = arm_of(convolutions(), arm)
    layer = model[1]
    assert isinstance(layer, kind)
    assert getattr(layer, "eps", 0.01) == 0.01
    assert getattr(layer, "momentum", 0.3) in (0.3, 0.1)  # instance normalization keeps no statistics
    assert layer.weight is None
    assert len([m for m in model.modules() if isinstance(m, kind)]) == 1
    if isinstance(layer, BATCH):
        assert layer.momentum == 0.3
    model(X).sum()


def test_every_is_every_hidden_layer() -> None:
    model = arm_of(convolutions(), "batch", where="every")
    assert len([m for m in model.modules() if isinstance(m, BATCH)]) == 2
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert str(arm_of(copy.deepcopy(bare), "batch")) == str(arm_of(bare, "batch", where="every"))


def test_normalizations_of_other_kinds_are_places_too() -> None:
    def tokens() -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, 6), nn.LayerNorm(6, eps=0.02), nn.GELU(), nn.RMSNorm(6), nn.Flatten(), nn.Linear(18, 2)
        )

    x = torch.randn(5, 3, 4)
    model = arm_of(tokens(), "batch", x)
    assert [type(model[k]) for k in (1, 3)] == [LastAxis, LastAxis]
    assert model[1].norm.eps == 0.02
    out = model[1](torch.randn(7, 3, 6) * 9 + 4)
    assert out.mean((0, 1)).abs().max() < 1e-5  # over all axes but the last
    plain = arm_of(tokens(), "without", x)
    assert not [m for m in plain.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    grouped = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2))
    assert isinstance(arm_of(grouped, "batch")[1], nn.BatchNorm2d)


def test_rms_and_dynamic_tanh_by_their_formulas() -> None:
    x = torch.randn(5, 6, 4, 3, dtype=torch.float64)
    rms = RmsOfSample(6, 0.1, affine=True).double()
    rms.weight.data.uniform_()
    wanted = x / (x.flatten(1).square().mean(1) + 0.1).sqrt().view(-1, 1, 1, 1) * rms.weight.view(1, 6, 1, 1)
    torch.testing.assert_close(rms(x), wanted)
    dyt = DynamicTanh(6, affine=True).double()
    for parameter in dyt.parameters():
        parameter.data.uniform_()
    wanted = torch.tanh(dyt.alpha * x) * dyt.weight.view(1, 6, 1, 1) + dyt.bias.view(1, 6, 1, 1)
    torch.testing.assert_close(dyt(x), wanted)


def test_what_cannot_be_taken_out_is_said() -> None:
    bare = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(UserError, match="no normalization to take out"):
        arm_of(bare, "without", torch.randn(3, 4))
    wide = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm((3, 5)), nn.Flatten(), nn.Linear(15, 2))
    with pytest.raises(UserError, match=r"normalizes over 2 axes.*build\(arm, seed\)"):
        arm_of(wide, "batch", torch.randn(2, 3, 4))


def test_the_tree_says_what_differs() -> None:
    lines = tree_lines({"as_written": str(convolutions()), "without": str(arm_of(convolutions(), "without"))})
    assert lines[0] == "as_written:"
    at = lines.index("without, against as_written:")
    changed = lines[at + 1 :]
    assert any(line.startswith("  -  (1): BatchNorm2d(6, eps=0.01, momentum=0.3, affine=False") for line in changed)
    assert "  +  (1): Identity()" in changed
    assert len(changed) == 4  # the convolution's bias and the normalization


NET = """
from torch import nn
def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.2), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
"""


@pytest.mark.parametrize(("rule", "levels"), [("keep", {0.0}), ("replace", {0.0, 0.5})])
def test_a_study_of_the_network_as_written(
    rule: str, levels: set[float], small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("written_net.py").write_text(NET)
    result = study(
        str(small_npz), "written_net.py:net", "without,as_written", tmp_path / "out", quick=True, lrs="0.1,1", steps=8,
        workers=1, dropout=rule, progress=sys.stdout,
    )  # fmt: skip
    assert set(result.runs["dropout"]) == levels
    assert (result.claims["dropout"].verdict == "not measurable") == (rule == "keep")
    assert ("keeps its own dropout" in (result.claims["dropout"].reason or "")) == (rule == "keep")
    assert "Dropout(p=0.2" in result.summary["networks"]["as_written"]
    assert "BatchNorm1d(8, eps=1e-05, momentum=0.2" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "as_written, against without:" in printed
    with pytest.raises(UserError, match=r"other .*own_dropout"):
        study(
            str(small_npz), "written_net.py:net", "without,as_written", tmp_path / "out", quick=True, lrs="0.1,1",
            steps=8, resume=True, dropout="keep" if rule == "replace" else "replace",
        )  # fmt: skip


def test_dropout_of_the_network_is_kept_unless_it_is_to_be_replaced(
    small_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("dropping.py").write_text(
        NET.replace("0.2)", "0.9)") + "def whole():\n    n = net()\n    n[3].p = 0.0\n    return n\n"
    )
    data = load(str(small_npz))
    run = Run("as_written", "measure", 1, 0.1, 0.0, 0.0, 20, "sgd", 8)

    def losses(function: str, rule: str) -> list[float]:
        architecture = Architecture(f"dropping.py:{function}", data.shape, data.classes, 20, dropout=rule)
        return train(run, architecture, data)[1]["train_loss"]

    assert losses("net", "replace") == losses("whole", "keep")  # a level of zero in the place of its own
    assert losses("net", "keep") != losses("whole", "keep")


def test_every_arm_has_words() -> None:
    assert all(arm.words for arm in ARMS.values())
    with pytest.raises(UserError, match="unknown rule 'here'"):
        study(where="here")
