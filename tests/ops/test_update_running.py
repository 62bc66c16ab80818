"""The update of the buffers: counters of any dtype, and values that differ by more than a mantissa."""

import io

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d
from batchnorm.ops import fused

COUNTERS = [
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.complex128,
]  # fmt: skip


def trained(layer, counter, batches=3):
    """The state after some batches, by a layer whose counter has been converted."""
    layer.num_batches_tracked = counter.clone()
    for seed in range(batches):
        torch.manual_seed(seed)
        layer(torch.randn(6, 3))
    return layer.state_dict()


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", COUNTERS, ids=str)
def test_a_counter_of_any_dtype_counts_on_as_torchs(dtype, momentum):
    for counter in (torch.tensor(2, dtype=dtype), torch.tensor([2], dtype=dtype), torch.tensor([5, 2], dtype=dtype)[1]):
        got = trained(BatchNorm1d(3, momentum=momentum), counter)
        want = trained(nn.BatchNorm1d(3, momentum=momentum), counter)
        assert got["num_batches_tracked"].dtype == dtype
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("variant", [{}, {"ghost_batch_size": 3}, {"nonfinite": "skip"}, {"accumulation_steps": 2}])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_every_variant_counts_in_any_dtype(variant, momentum, dtype):
    results = [
        trained(BatchNorm1d(3, momentum=momentum, **variant), torch.tensor(0, dtype=kind), 4)
        for kind in (dtype, torch.int64)
    ]
    torch.testing.assert_close(results[0], results[1], check_dtype=False)


@pytest.mark.parametrize("start", [126, 127], ids=str)
def test_a_counter_that_is_full_does_what_torchs_does(start):
    for dtype in (torch.int8, torch.float16):
        start = start if dtype == torch.int8 else 2048
        results = [trained(kind(3), torch.tensor(start, dtype=dtype)) for kind in (BatchNorm1d, nn.BatchNorm1d)]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("counter", "words"), [(torch.tensor(True), "cannot count"), (torch.zeros(2, dtype=torch.long), "one number")]
)
def test_what_cannot_count_is_refused(counter, words):
    net = nn.Sequential(BatchNorm1d(3))
    net[0].num_batches_tracked = counter
    before = net[0].running_mean.clone()
    with pytest.raises(RuntimeError, match=words):
        net(torch.randn(4, 3))
    assert torch.equal(net[0].running_mean, before)


def test_networks_converted_as_a_whole_train_on():
    """Federated averaging and `Module.type` turn every number of a network to float32; `load_state_dict` keeps it."""
    nets = [nn.Sequential(kind(3)).type(torch.float32) for kind in (BatchNorm2d, nn.BatchNorm2d)]
    averaged = {name: torch.stack([v.float(), v.float() + 1]).mean(0) for name, v in nets[0].state_dict().items()}
    x = torch.randn(4, 3, 2, 2)
    for net in nets:
        net.load_state_dict({name: value.clone() for name, value in averaged.items()}, assign=True)
        net(x)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict())
    assert nets[0][0].num_batches_tracked == 1.5
    stored = io.BytesIO()
    torch.save(nets[0].state_dict(), stored)
    stored.seek(0)
    again = nn.Sequential(BatchNorm2d(3))
    again.load_state_dict(torch.load(stored, weights_only=True))
    again(x)


@pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-30])
@pytest.mark.parametrize("momentum", [1.0, None])
@pytest.mark.parametrize("path", ["operator", "reference", "layer"])
def test_a_batch_far_below_the_old_values_is_kept(path, momentum, scale):
    old = (torch.ones(3, dtype=torch.float64), torch.full((3,), 7.0, dtype=torch.float64), torch.tensor(0))
    mean = torch.full((1, 3), scale, dtype=torch.float64)
    if path == "layer":
        layer = BatchNorm1d(3, momentum=momentum).double()
        x = torch.randn(8, 3, dtype=torch.float64) * scale
        layer(x)
        torch.testing.assert_close(layer.running_var, x.var(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.running_mean, x.mean(0), rtol=1e-9, atol=0)
        return
    update = fused.update_running_ if path == "reference" else torch.ops.batchnorm.update_running_
    update(*old, mean, mean, torch.tensor([1e9], dtype=torch.float64), momentum, False)
    torch.testing.assert_close(old[0], mean[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(old[1], mean[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0, -0.5, 1.5])
def test_any_momentum_gives_torchs_buffers(momentum):
    layers = [kind(3, momentum=momentum).double() for kind in (BatchNorm1d, nn.BatchNorm1d)]
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(6, 3, dtype=torch.float64) * 100
        for layer in layers:
            layer(x)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=1e-13, atol=1e-13)
