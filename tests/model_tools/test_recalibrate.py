"""`recalibrate`: the population's moments whatever the batches, what is left alone, and the way back."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import UserError
from batchnorm.model_tools import freeze, recalibrate

from .nets import PreActivation, Unregistered


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), batchnorm.BatchNorm1d(8),
        nn.Tanh(), nn.Linear(8, 5), nn.BatchNorm1d(5),
    ).double()  # fmt: skip


def data(n: int = 130) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    x[-2:] += 50  # the last two, a batch of their own below, are nothing like the rest
    return x


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def population(model: nn.Sequential, x: Tensor) -> None:
    """The definition: layer after layer, on all data at once, in eval."""
    model.eval()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.copy_(x.mean(0))
                module.running_var.copy_(x.var(0))
            x = module(x)


@pytest.mark.parametrize("sizes", [[130], [128, 2], [1] * 130, [64, 1, 65]])
def test_every_layer_gets_the_populations_moments_however_the_data_are_cut(sizes):
    model, reference, x = deep(), deep(), data()
    result = recalibrate(model, x.split(sizes))
    population(reference, x)
    for key, value in reference.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-10, atol=1e-12)
    assert (result.samples, result.batches) == (130, len(sizes))
    assert model[1].num_batches_tracked == len(sizes)
    assert all(module.training for module in model.modules())


def test_one_pass_uses_the_batches_own_statistics_and_weights_them_by_count():
    model, x = deep(), data()
    recalibrate(model, x.split([100, 30]), layerwise=False)
    first = model[0](x)
    torch.testing.assert_close(model[1].running_mean, first.mean(0))
    torch.testing.assert_close(model[1].running_var, first.var(0))
    second = []
    with torch.no_grad():
        for part in first.split([100, 30]):
            normal = (part - part.mean(0)) / (part.var(0, unbiased=False) + 1e-5).sqrt()
            second.append(model[4](normal.relu()))
    torch.testing.assert_close(model[5].running_mean, torch.cat(second).mean(0))
    torch.testing.assert_close(model[5].running_var, torch.cat(second).var(0))


@pytest.mark.parametrize("sizes", [[130], [128, 2]])
def test_the_biased_variance_is_that_of_exactly_these_data(sizes):
    """A second recalibration finds nothing to move: the shift too is measured against the variance asked for."""
    model, x = deep(), data()
    recalibrate(model, x.split(sizes), unbiased=False)
    first = model[0](x)
    torch.testing.assert_close(model[1].running_var, first.var(0, unbiased=False), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.eval()[1](first).var(0, unbiased=False), 1 - 1e-5 / (model[1].running_var + 1e-5))
    again = recalibrate(model, x.split(sizes), unbiased=False)
    assert max(shift.log2_var_max for shift in again.layers.values()) < 1e-12


def test_undo_and_the_shift_that_is_reported():
    model, x = deep(), data()
    before = state(model)
    result = recalibrate(model, [x])
    inputs = model[0](x)
    expected = (inputs.mean(0) / (inputs.var(0) + 1e-5).sqrt()).square().mean().sqrt()
    assert result.layers["1"].mean_rms == pytest.approx(expected.item())
    expected = ((1 + 1e-5) / (inputs.var(0) + 1e-5)).log2().abs().max()
    assert result.layers["1"].log2_var_max == pytest.approx(expected.item())
    assert result.layers["1"].count == 130
    assert "1 " in str(result)
    again = recalibrate(model, [x])
    assert max(shift.mean_max for shift in again.layers.values()) < 1e-9
    after = state(model)
    again.undo()
    result.undo()
    assert_same(model, before)
    model.load_state_dict(after)
    result.undo()
    assert_same(model, after)


def test_frozen_layers_and_layers_without_statistics_are_left_alone():
    model = deep()
    freeze(model[1])
    model[5].eval()
    model.append(nn.BatchNorm1d(5, track_running_stats=False).double())
    model.register_module("unused", nn.BatchNorm1d(2))
    model.forward = lambda x: nn.Sequential(*list(model)[:10])(x)
    before = state(model)
    result = recalibrate(model, [data()])
    assert result.skipped == {
        "1": "frozen", "5": "frozen", "9": "keeps no running statistics", "unused": "the data never reach it",
    }  # fmt: skip
    assert list(result.layers) == ["8"]
    assert torch.equal(model[5].running_mean, before["5.running_mean"])
    assert not model[5].training
    assert model[9].training


def test_a_model_in_eval_is_recalibrated_and_stays_in_eval():
    model = deep().eval()
    assert len(recalibrate(model, [data()]).layers) == 3
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("one_shot", [True, False])
def test_forms_of_batches_and_the_sample_budget(one_shot):
    x = data(40)
    pairs = [(part, torch.zeros(len(part))) for part in x.split(8)]
    model, by_dict, by_call = deep(), deep(), deep()
    assert recalibrate(model, iter(pairs) if one_shot else pairs, samples=20).samples == 24
    recalibrate(by_dict, [{"input": part} for part in x[:24].split(8)])
    batches = [{"x": [part]} for part in x[:24].split(8)]
    recalibrate(by_call, batches, forward=lambda m, batch: m(batch["x"][0]))
    for other in (by_dict, by_call):
        assert_same(other, state(model))


def test_random_data_are_the_same_for_every_layer_and_the_generators_stay():
    class Noisy:
        def __iter__(self):
            return (torch.randn(20, 3, dtype=torch.float64) + random.random() for _ in range(3))

    model, fixed = deep(), deep()
    torch.manual_seed(5)
    random.seed(5)
    batches = list(Noisy())
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    recalibrate(model, Noisy())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    recalibrate(fixed, batches)
    assert_same(model, state(fixed))


def test_a_layer_called_twice_pools_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, affine=False)

        def forward(self, x):
            return self.norm(x) + self.norm(10 * x + 7)

    model, x = Twice().double(), data()
    recalibrate(model, [x])
    both = torch.cat([x, 10 * x + 7])
    torch.testing.assert_close(model.norm.running_mean, both.mean(0))
    torch.testing.assert_close(model.norm.running_var, both.var(0))


def test_masks_and_feature_axes_are_followed():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNorm1d(3, feature_axis=-1).double()

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    model, x = Padded(), data(120).view(20, 6, 3)
    mask = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    recalibrate(model, [{"x": x[:13], "mask": mask[:13]}, {"x": x[13:], "mask": mask[13:]}])
    torch.testing.assert_close(model.norm.running_mean, x[mask].mean(0))
    torch.testing.assert_close(model.norm.running_var, x[mask].var(0))


def test_convolutions_and_half_precision_buffers():
    model = PreActivation()
    model.last_norm.half()
    model.last_norm.register_forward_pre_hook(lambda m, args: args[0].half())
    model.last_norm.register_forward_hook(lambda m, args, out: out.float())
    x = torch.randn(6, 3, 8, 8)
    recalibrate(model, x.split([5, 1]))
    seen = []
    model.norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.eval()(x)
    torch.testing.assert_close(model.norm.running_var, seen[0].var((0, 2, 3)))
    assert model.last_norm.running_var.dtype == torch.float16


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "no batch"),
        ([torch.zeros(4, 7)], {}, "does not run on batch 0"),
        ([data(), torch.full((2, 3), torch.nan, dtype=torch.float64)], {}, "batch 1 brings NaN or Inf to 1"),
        ([data()[:1]], {}, "1 value a channel"),
        ([data()], {"samples": 0}, "at least 1"),
        ([data()], {"process_group": "all"}, "process_group"),
    ],
)
@pytest.mark.parametrize("layerwise", [True, False])
def test_a_refusal_leaves_the_model_alone(batches, options, message, layerwise):
    if message == "1 value a channel" and not layerwise:
        message = "does not run on batch 0.*more than 1 value"
    model = deep()
    model[5].eval()
    before, hooks = state(model), [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(UserError, match=message):
        recalibrate(model, batches, layerwise=layerwise, **options)
    assert_same(model, before)
    assert [m.training for m in model] == [True] * 5 + [False] + [True] * 3
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize(("layerwise", "passes"), [(True, 3), (False, 1)])
def test_the_progress_bar_moves_with_every_batch(monkeypatch, capsys, layerwise, passes):
    moves = []
    monkeypatch.setattr(Progress, "update", lambda self, task, *, completed, total: moves.append((completed, total)))
    done = recalibrate(deep(), data().split(32), layerwise=layerwise, progress=True)
    total = passes * done.batches
    assert passes == (len(done.layers) if layerwise else 1)
    assert moves == [(n, total) for n in range(total + 1)]
    assert capsys.readouterr().out == ""


def _rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    x = data()
    mine = [list(x[:90].split(40)), list(x[90:].split(7)), []][rank]
    model = deep()
    recalibrate(model, mine)
    torch.save(copy.deepcopy(model.state_dict()), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_pool_their_data_exactly(tmp_path):
    arguments = (str(tmp_path / "store"), str(tmp_path))
    # Forked: three more interpreters would import torch for half a minute on a busy machine.
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=3, start_method="fork")
    reference = deep()
    population(reference, data())
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for key, value in reference.state_dict().items():
        assert torch.equal(states[0][key], states[1][key])
        assert torch.equal(states[0][key], states[2][key])
        if "running" in key:
            torch.testing.assert_close(states[0][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_model_that_writes_to_its_input_changes_no_batch(layerwise):
    """Each layer needs the data anew: a second pass would see what the first one wrote."""
    model = nn.Sequential(nn.SiLU(inplace=True), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    batches = [torch.randn(8, 3, dtype=torch.float64) for _ in range(2)]
    before = [batch.clone() for batch in batches]
    recalibrate(model, batches, layerwise=layerwise)
    torch.testing.assert_close(batches, before, rtol=0, atol=0)
    seen = torch.nn.functional.silu(torch.cat(batches))
    torch.testing.assert_close(model[1].running_mean, seen.mean(0))
    torch.testing.assert_close(model[1].running_var, seen.var(0))


COUNTERS = [torch.float32, torch.float16, torch.int32, torch.uint8, torch.complex64, torch.bool]


@pytest.mark.parametrize("dtype", COUNTERS)
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_counters_of_any_dtype_are_set_and_put_back(kind, dtype):
    model, x = nn.Sequential(kind(3)), torch.randn(300, 3)
    model[0].num_batches_tracked = torch.ones((), dtype=dtype)
    before = state(model)
    result = recalibrate(model, x.split(1))
    wraps = dtype is torch.uint8  # as torch's own counting does
    assert model[0].num_batches_tracked == (300 % 256 if wraps else True if dtype is torch.bool else 300)
    assert model[0].num_batches_tracked.dtype is dtype
    result.undo()
    assert_same(model, before)
    assert model[0].num_batches_tracked.dtype is dtype


def test_statistics_that_do_not_fit_a_half_precision_buffer_are_refused():
    model, x = nn.Sequential(batchnorm.BatchNorm1d(3)).half(), torch.randn(64, 3).half()
    recalibrate(model, [x]).undo()
    before = state(model)
    with pytest.raises(UserError, match=r"of 0 do not fit torch\.float16"):
        recalibrate(model, [1000 * x])
    assert_same(model, before)


def test_what_no_walk_over_the_model_finds_is_named_and_left_as_it_was():
    model = nn.Sequential(Unregistered(), nn.BatchNorm1d(4)).double()
    model[0].held["a"][0].double()
    norm = model[0].held["a"][0][1]
    result = recalibrate(model, [torch.randn(8, 4).double()])
    assert result.skipped == {"0.held.1": "not registered as a submodule"}
    assert [*result.layers] == ["1"]
    assert norm.running_mean.eq(0).all(), "in training mode, which model.train() and .eval() do not reach"
    assert norm.num_batches_tracked == 0


def test_frozen_layers_are_reached_on_request():
    model, live = freeze(deep()), deep()
    before = [(m.training, m.weight.requires_grad) for m in model.modules() if hasattr(m, "running_mean")]
    recalibrate(model, data().split(20), frozen=True)
    recalibrate(live, data().split(20))
    for (key, value), other in zip(model.state_dict().items(), live.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert [(m.training, m.weight.requires_grad) for m in model.modules() if hasattr(m, "running_mean")] == before
