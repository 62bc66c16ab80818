"""Wrappers for training on many devices, averages of weights, and calls without a module's own state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

import batchnorm

from .nets import KINDS, assert_same, assert_same_calls, images, left_by, pair


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def without(prefix: str, left: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in left.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bucket_cap_mb": 1}, {"static_graph": True}], ids=str)
def test_ddp(group, kind, options):
    theirs, ours = pair(kind)
    parallel = DistributedDataParallel(ours, **options)
    for training in (True, True, False):
        x = images()
        parallel.train(training)
        assert_same(without("module.", left_by(parallel, x)), left_by(theirs.train(training), x))
    del parallel  # after the group it would join Gloo's thread with the GIL held


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_ddp_and_convert(group, wrapped_first):
    """`convert` also reaches into the wrapper."""
    theirs, ours = pair("convert")
    ours = batchnorm.revert(ours)
    if wrapped_first:
        parallel = batchnorm.convert(DistributedDataParallel(ours))
    else:  # SyncBatchNorm, which DDP refuses on the CPU, of a world of one is the plain layer's function
        parallel = DistributedDataParallel(batchnorm.convert(nn.SyncBatchNorm.convert_sync_batchnorm(ours)))
    assert isinstance(ours.norm, batchnorm.BatchNorm2d)
    x = images()
    assert_same(without("module.", left_by(parallel, x)), left_by(theirs, x))
    del parallel


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_fsdp2(group, kind, parts):
    theirs, ours = pair(kind)
    mesh = init_device_mesh("cpu", (1,))
    for model in (ours, theirs):
        if parts:
            for name in ("stem", "block.1", "norm"):
                fully_shard(model.get_submodule(name), mesh=mesh)
        fully_shard(model, mesh=mesh)
    for training in (True, True, False):
        x = images()
        both = [left_by(model.train(training), x) for model in (ours, theirs)]
        assert_same(*({name: whole(value) for name, value in left.items()} for left in both))
    assert isinstance(ours.norm, nn.BatchNorm2d)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_model_and_update_bn(kind):
    """`update_bn` finds every norm, resets it and takes the average over all batches (momentum=None)."""
    theirs, ours = pair(kind)
    data, averages = [images() for _ in range(3)], []
    for model in (ours, theirs):
        average = swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for seed, x in enumerate(data):
            left_by(model.train(), x, seed)
            optimizer.step()
            average.update_parameters(model)
        swa_utils.update_bn(data, average)
        averages.append(average)
    assert_same(dict(averages[0].state_dict()), dict(averages[1].state_dict()), 1e-9)
    assert {m.momentum for m in averages[0].modules() if isinstance(m, nn.BatchNorm2d)} == {0.1, 0.3}
    assert_same_calls(*averages, tolerance=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_buffers(kind):
    theirs, ours = pair(kind)
    states = []
    for model in (ours, theirs):
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
        for seed in range(3):
            torch.manual_seed(seed)
            model(images())
            average.update_parameters(model)
        states.append(dict(average.state_dict()))
    assert_same(*states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_functional_call(kind, training):
    """Given buffers are those that move; the module's own stay."""
    theirs, ours = (model.train(training) for model in pair(kind))
    x, results = images(), []
    for model in (ours, theirs):
        own = copy.deepcopy(model.state_dict())
        given = {name: value.clone() * 2 for name, value in own.items()}
        y = functional_call(model, given, (x,))
        torch.testing.assert_close(model.state_dict(), own, rtol=0, atol=0)
        results.append({"output": y, **given})
    assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_models(kind):
    """An ensemble in eval: the parameters and buffers of three models, stacked."""
    theirs, ours = (model.eval() for model in pair(kind))
    x, results = images(), []
    for model in (ours, theirs):
        torch.manual_seed(2)
        stacked = {k: v * (torch.rand(3, *[1] * v.dim()) + 0.5) for k, v in model.state_dict().items() if v.dim()}
        results.append(vmap(lambda state, model=model: functional_call(model, state, (x,)))(stacked))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_per_sample(kind):
    theirs, ours = (model.eval() for model in pair(kind))
    x, g, results = images(), torch.randn(6, 2, dtype=torch.float64), []
    for model in (ours, theirs):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, x, g, model=model):
            return (functional_call(model, parameters, (x.unsqueeze(0),)) * g).sum()

        results.append(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, g))
    assert_same(*results)
