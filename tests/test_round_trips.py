"""What a layer keeps between calls, through copies, pickles, checkpoints, resets and failures."""

import copy
import pickle

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d, Renorm
from batchnorm.functional import batch_norm


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("keywords", [{}, {"ghost_batch_size": 2}, {"domains": 2}, {"renorm": Renorm(1.5, 0.5)}])
def test_a_copy_in_the_middle_of_an_accumulation_goes_on_from_there(again, keywords):
    layer = BatchNorm1d(3, accumulation_steps=3, **keywords)
    parts = [torch.randn(4, 3) for _ in range(6)]
    for part in parts[:2]:
        layer(part)
    other = again(layer)
    for part in parts[2:]:
        torch.testing.assert_close(other(part), layer(part))
    assert other.num_batches_tracked == 2
    torch.testing.assert_close(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("restart", [nn.Module.load_state_dict, lambda layer, _: layer.reset_running_stats()])
def test_other_statistics_begin_a_new_accumulation(restart):
    layer, fresh = BatchNorm1d(3, accumulation_steps=2), BatchNorm1d(3, accumulation_steps=2)
    layer(torch.randn(4, 3) + 9)
    restart(layer, fresh.state_dict())
    for _ in range(2):
        x = torch.randn(4, 3)
        layer(x)
        fresh(x)
    torch.testing.assert_close(layer.state_dict(), fresh.state_dict())


def test_reset_reaches_every_domain():
    layer = BatchNorm1d(3, domains=3, domain_affine=True, nonfinite="skip")
    fresh = copy.deepcopy(layer)
    for number in range(3):
        layer(torch.randn(4, 3) + 5, domain=number)
    layer(torch.full((4, 3), float("nan")), domain=2)
    nn.init.normal_(layer.domain_weight)
    nn.init.normal_(layer.domain_bias)
    layer.reset_parameters()
    for name, value in (*layer.named_buffers(), *layer.named_parameters()):
        assert torch.equal(
            value, fresh.get_parameter(name) if name in dict(fresh.named_parameters()) else fresh.get_buffer(name)
        ), name


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"ghost_batch_size": 2},
        {"renorm": Renorm()},
        {"domains": 2},
        {"nonfinite": "skip"},
        {"accumulation_steps": 2},
    ],
)
def test_state_dict_through_a_file_and_into_torch(keywords, tmp_path):
    layer = BatchNorm2d(3, **keywords)
    for _ in range(2):
        layer(torch.randn(4, 3, 2, 2) * 3 + 1)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    again = BatchNorm2d(3, **keywords)
    again.load_state_dict(state)
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(again.eval()(x), layer.eval()(x))
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict({name: value for name, value in state.items() if not name.startswith("domain_")})
    torch.testing.assert_close(plain.eval()(x), again(x))


def test_a_lone_sample_of_a_domain_moves_no_domain():
    layer = BatchNorm1d(3, domains=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="domain 1 has a single sample"):
        layer(torch.randn(4, 3), domain=torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.eval()(torch.randn(4, 3), domain=torch.tensor([0, 0, 0, 1]))


def test_skip_with_the_average_of_all_batches_counts_only_those_that_took_part():
    layer, plain = BatchNorm1d(3, nonfinite="skip", momentum=None), BatchNorm1d(3, momentum=None)
    for step in range(5):
        x = torch.randn(8, 3) + step
        if step in (0, 3):
            x[2] = float("nan")
            layer(x)
            continue
        layer(x)
        plain(x)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (5, 2)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e22), (torch.float16, 1e4), (torch.bfloat16, 1e30)])
def test_skip_also_where_the_buffers_cannot_hold_the_variance(dtype, scale):
    layer = BatchNorm1d(3, nonfinite="skip").to(dtype)
    before = copy.deepcopy(layer.state_dict())
    x = (torch.randn(8, 3) * scale).clamp(
        -6e4 if dtype == torch.float16 else -1e38, 6e4 if dtype == torch.float16 else 1e38
    )
    layer(x.to(dtype))
    assert torch.equal(layer.running_var, before["running_var"])
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (1, 1)
    mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    batch_norm(x.to(dtype), mean, var, training=True, nonfinite="skip")
    assert torch.equal(var, torch.ones(3, dtype=dtype))
