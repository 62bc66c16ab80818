"""The arms: equal but for the normalization, trainable, and refused in one sentence where they make no sense."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import UserError
from batchnorm.experiment.data.dataset import Dataset
from batchnorm.experiment.data.opening import load
from batchnorm.experiment.training.arms import ARMS, group_width
from batchnorm.experiment.training.networks import Architecture
from batchnorm.experiment.training.probe import Probe, layer_table, use_batch_statistics
from batchnorm.experiment.training.runs import Run
from batchnorm.experiment.training.train import evaluation_steps, set_dropout, train
from batchnorm.inspect.untouched import modes_and_buffers_kept


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def architecture(model: str, data: Dataset) -> Architecture:
    return Architecture(model, data.shape, data.classes, 60)


def run(arm: str, **changes: object) -> Run:
    options = {"seed": 1, "lr": 1.0, "weight_decay": 0.0, "dropout": 0.0, "steps": 20, **changes}
    return Run(arm, "measure", batch_size=60, optimizer="sgd", **options)


def layers(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(model: str, arm: str, digits: Dataset) -> None:
    refusals = {
        ("mlp", "instance"): "fully connected",
        ("mlp", "without"): "to take out",
        ("cnn", "without"): "to take out",
    }
    if (model, arm) in refusals:
        with pytest.raises(UserError, match=refusals[model, arm]):
            architecture(model, digits).build(arm, 1)
        return
    row, trace = train(run(arm, lr=0.3), architecture(model, digits), digits)
    assert not row["diverged"]
    assert trace["train_loss"][-1] < trace["train_loss"][1]
    assert len(trace["percentiles"]["values"]) == len(trace["steps"]) == len(trace["val_accuracy"])
    assert bool(trace["affine"]) == (arm not in ("as_written", "none", "batch_no_affine"))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_arms_of_one_seed_start_from_the_same_weights(model: str, digits: Dataset) -> None:
    plain, normalized = (architecture(model, digits).build(arm, 3) for arm in ("none", "batch"))
    pairs = zip(
        *([m.weight for m in layers(net, nn.Linear) + layers(net, nn.Conv2d)] for net in (plain, normalized)),
        strict=True,
    )
    assert all(torch.equal(first, second) for first, second in pairs)
    assert not layers(plain, nn.modules.batchnorm._BatchNorm)
    assert {type(m) for m in layers(normalized, nn.modules.batchnorm._BatchNorm)} <= {
        batchnorm.BatchNorm1d,
        batchnorm.BatchNorm2d,
    }


def test_the_mlp_is_the_papers(digits: Dataset) -> None:
    model = architecture("mlp", digits).build("none", 0)
    shapes = [tuple(layer.weight.shape) for layer in layers(model, nn.Linear)]
    assert shapes == [(100, 64), (100, 100), (100, 100), (10, 100)]
    assert len(layers(model, nn.Sigmoid)) == 3


@pytest.mark.parametrize(("features", "width"), [(100, 20), (32, 16), (64, 16), (7, 7), (1, 1)])
def test_groups_are_about_sixteen_wide(features: int, width: int) -> None:
    assert group_width(features) == width


def test_layer_table_counts_positions(digits: Dataset) -> None:
    table = layer_table(architecture("cnn", digits).build("batch", 0), torch.zeros(2, 1, 8, 8), 60)
    assert [line["m"] for line in table] == [60 * 64, 60 * 16, 60 * 16, 60 * 4]
    table = layer_table(architecture("mlp", digits).build("group", 0), torch.zeros(2, 1, 8, 8), 60)
    assert [line["m"] for line in table] == [20, 20, 20]


def test_probing_moves_no_statistics(digits: Dataset) -> None:
    model = architecture("cnn", digits).build("batch", 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.from_numpy(digits.x["validation"])
    values = Probe(model, x).percentiles(model)
    assert len(values) == 8
    assert all(low <= middle <= high for low, middle, high in values)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_the_probe_sees_what_the_last_hidden_activation_is_fed(digits: Dataset) -> None:
    model = architecture("mlp", digits).build("batch", 0)
    x = torch.from_numpy(digits.x["validation"])
    probe = Probe(model, x)
    assert probe.layer == "6"
    with modes_and_buffers_kept(model):
        use_batch_statistics(model)
        fed = model[:6](x[:256])
    wanted = torch.quantile(fed[:, 0].double(), torch.tensor([0.15, 0.5, 0.85], dtype=torch.float64))
    assert probe.percentiles(model)[0] == pytest.approx(wanted.tolist(), rel=1e-4)


class Regularized(nn.Module):
    """A layer whose result is not returned runs after the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last, self.side = nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3), nn.Linear(9, 2)
        self.late = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.first(x))
        scores = self.last(hidden)
        self.penalty = self.side(self.late(hidden)).square().mean().item()
        return scores


def test_what_runs_after_the_output_layer_is_not_hidden() -> None:
    assert Probe(Regularized(), torch.randn(8, 4)).layer == "act"


def test_dropout_reaches_every_hidden_activation_and_only_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 900), nn.Softplus(), nn.Linear(900, 900), nn.Softplus(), nn.Linear(900, 3))
    x = torch.ones(2, 4)
    plain = model(x)
    set_dropout(model, 0.5, x)
    assert not torch.equal(model(x), plain)
    assert torch.equal(model.eval()(x), plain)
    seen: list[torch.Tensor] = []
    for layer in (model[0], model[2], model[4]):
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.train()(x)
    assert torch.equal(seen[0], x)
    for dropped in seen[1:]:  # Softplus is never zero by itself
        assert 0.45 < (dropped == 0).float().mean() < 0.55


def test_a_networks_own_dropout_takes_the_studys_share() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.9), nn.Linear(8, 3))
    set_dropout(model, 0.0, torch.ones(2, 4))
    assert model[1].p == 0.0
    set_dropout(model, 0.25, torch.ones(2, 4))
    assert model[1].p == 0.25
    assert not model[2]._forward_pre_hooks


def test_a_diverging_run_is_a_result(digits: Dataset) -> None:
    row, trace = train(run("none", lr=1e30, steps=50), architecture("cnn", digits), digits)
    assert row["diverged"] is True
    assert row["val_accuracy"] == digits.chance("validation")
    assert row["test_accuracy"] == digits.chance("test")
    assert all(math.isfinite(value) for value in trace["val_accuracy"])


def test_a_run_repeats_exactly_and_leaves_torch_as_it_was(digits: Dataset) -> None:
    state = torch.get_rng_state()
    first, second = (train(run("batch", dropout=0.5), architecture("mlp", digits), digits) for _ in range(2))
    assert {**first[0], "seconds": 0} == {**second[0], "seconds": 0}
    assert first[1] == second[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_evaluations_are_geometric() -> None:
    steps = evaluation_steps(1000)
    assert steps[:4] == [0, 1, 2, 3]
    assert steps[-1] == 1000
    assert len(steps) <= 41
    assert max(b / a for a, b in itertools.pairwise(steps[8:])) < 1.35
    assert evaluation_steps(1) == [0, 1]


NETS = """
import torch
from torch import nn
def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
def by_arm(arm, seed):
    torch.manual_seed(seed)
    norm = [nn.BatchNorm1d(16)] if arm == "batch" else []
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), *norm, nn.ReLU(), nn.Linear(16, 10))
class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)
    def forward(self, x):
        return self.b(self.a(x).relu().mean((2, 3)))
"""


@pytest.mark.parametrize("function", ["plain", "by_arm", "Functional"])
def test_a_users_network_is_trained(
    function: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    for arm in ("none", "batch"):
        arch = architecture(f"users_nets:{function}", digits)
        row, trace = train(run(arm, lr=0.1, dropout=0.1), arch, digits)
        assert not row["diverged"]
        assert row["drift"] is not None
        assert bool(trace["affine"]) == (arm == "batch")
