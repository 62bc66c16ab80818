"""`insert`: which layers it finds, what becomes of the network, and that a refusal leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import BatchNorm1d, BatchNorm2d, insert, strip
from batchnorm.errors import UserError
from batchnorm.model_tools.insert import Normalized

from .nets import Attention, AutoEncoder, PreActivation, Residual, Shared, TiedHead, TypeSwitch


def normalized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Normalized)}


@pytest.mark.parametrize(
    ("model", "example", "hidden"),
    [
        (Residual(), torch.randn(4, 3, 8, 8), {"first", "second", "features"}),
        (Attention(), torch.randn(3, 5, 8), {"q", "k", "v", "out"}),
        (AutoEncoder(), torch.randn(4, 8), {"encode", "decode"}),
        (TiedHead(), torch.randint(0, 11, (3, 4)), {"hidden"}),
        (nn.Linear(3, 2), torch.randn(4, 3), set()),
        (nn.LSTM(3, 4), torch.randn(4, 2, 3), set()),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)), torch.randn(4, 3), set()),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(True), nn.Linear(4, 4)), (torch.randn(1, 3),), {"0"}),
        (nn.Sequential(nn.ConvTranspose3d(2, 4, 2), nn.Conv3d(4, 2, 2)), torch.randn(2, 2, 3, 3, 3), {"0"}),
        (PreActivation(), torch.randn(2, 3, 8, 8), set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("training", [True, False])
def test_hidden_layers_are_found_by_running(model, example, hidden, training):
    model = copy.deepcopy(model).train(training)
    assert insert(model, example) is model
    assert normalized(model) == hidden
    assert all(module.training is training for module in model.modules())
    for name in hidden:
        assert model.get_submodule(name).layer.bias is None
        assert model.get_submodule(name).bias is None


def test_the_normalization_sees_the_layer_without_bias_and_comes_before_the_activation():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    insert(model, torch.randn(8, 4), affine=False, eps=1e-3)
    x, seen = torch.randn(16, 4), []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, args, out: seen.append((type(m), args[0])))
    y = model(x)
    assert [kind for kind, _ in seen] == [nn.Linear, BatchNorm1d, nn.Sigmoid, nn.Linear]
    torch.testing.assert_close(seen[1][1], F.linear(x, model[0].weight))
    expected = F.batch_norm(F.linear(x, model[0].weight), None, None, training=True, eps=1e-3)
    torch.testing.assert_close(y, model[2](torch.sigmoid(expected)))


def test_a_linear_over_sequences_is_normalized_over_all_positions():
    model = insert(Attention(), torch.randn(3, 5, 8))
    x = torch.randn(7, 5, 8)
    out = model.q(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out.mean((0, 1)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((0, 1), unbiased=False), torch.ones(8), atol=1e-3, rtol=0)


def test_a_convolution_without_a_batch_axis():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    insert(model, torch.randn(3, 9, 9))
    assert isinstance(model[0].batch_norm, BatchNorm2d)
    assert model(torch.randn(3, 9, 9)).shape == (2, 5, 5)


def test_a_shared_layer_stays_shared_and_a_second_insert_changes_nothing():
    model = insert(Shared(), torch.randn(4, 6))
    assert model.one is model.again is model.blocks[0]
    keys = list(model.state_dict())
    insert(model, torch.randn(4, 6))
    assert list(model.state_dict()) == keys
    model(torch.randn(4, 6))
    assert model.one.batch_norm.num_batches_tracked == 3


def test_encoder_layers_do_not_pass_by_the_normalization_in_eval():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = insert(nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 8))
    calls = []
    model.layers[1].linear1.batch_norm.register_forward_hook(lambda *_: calls.append(1))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 4] = True
    with torch.no_grad():
        model(torch.randn(3, 5, 8), src_key_padding_mask=padding)
    assert calls


def test_copies_pickles_and_checkpoints():
    model = insert(Residual(), torch.randn(4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    model.eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = insert(Residual(), x).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(x), model(x))
    assert "first.layer.weight" in model.state_dict()
    assert "first.batch_norm.running_mean" in model.state_dict()


def test_attributes_of_the_layer_stay_readable():
    model = insert(Residual(), torch.randn(4, 3, 8, 8))
    assert model.first.out_channels == 8
    assert model.first.weight is model.first.layer.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.first.no_such_thing


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_dtype_of_the_new_parameters(dtype, kept):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    insert(model, torch.randn(5, 3, dtype=dtype))
    assert model[0].batch_norm.weight.dtype == model[0].batch_norm.running_var.dtype == kept
    assert model(torch.randn(5, 3, dtype=dtype)).dtype == dtype


def snapshot(model: nn.Module) -> tuple:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return repr(model), state, [m.training for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Residual(), torch.randn(4, 5), "does not run on the example input"),
        (nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), torch.randn(2, 3), "lazy"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(3), "no axis for the batch"),
        (TypeSwitch(), torch.randn(5, 4), "by hand"),
    ],
)
def test_a_refusal_is_one_sentence_and_leaves_the_model_alone(model, example, message):
    lazy = isinstance(model[0], nn.LazyLinear) if isinstance(model, nn.Sequential) else False
    before = None if lazy else snapshot(model)
    generator = torch.get_rng_state()
    with pytest.raises(UserError, match=message) as raised:
        insert(model, example)
    assert "\n" not in str(raised.value)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not normalized(model)
    if before is not None:
        after = snapshot(model)
        assert after[0] == before[0]
        assert after[2:] == before[2:]
        assert all(torch.equal(after[1][key], before[1][key]) for key in before[1])


def test_buffers_generators_and_gradients_are_left_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.Flatten())
    model.append(nn.Linear(4 * 16, 2))
    model(torch.randn(6, 3, 8, 8)).sum().backward()
    mean, grad = model[1].running_mean.clone(), model[0].weight.grad.clone()
    x, generator = torch.randn(6, 3, 8, 8), torch.get_rng_state()
    insert(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(model[0].weight.grad, grad)
    assert normalized(model) == {"3"}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.head(self.norm(self.one(x) if x.sum() < 1e9 else self.two(x)).relu())


@pytest.mark.parametrize("tool", [insert, strip])
def test_a_layer_that_other_values_may_reach_is_not_passed_over(tool):
    model, x = Branches(), torch.randn(3, 4)
    before = repr(model)
    with pytest.raises(UserError, match="does not reach layer two, and control flow depends on the data"):
        tool(model, x)
    assert repr(model) == before
    tool(model, x, trust_example=True)
    assert model.two.bias is None


def test_siamese_calls_and_what_changes_no_value():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.keep, self.head = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Linear(64, 2)

        def forward(self, x):
            a, b = (self.keep(self.conv(v)).clone().relu().flatten(1) for v in (x, -x))
            return self.head(a - b)

    model, x = Net(), torch.randn(3, 3, 4, 4)
    before = repr(model)
    insert(model, x)
    assert [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)] == ["conv.batch_norm"]
    assert repr(strip(model, x)) == before
