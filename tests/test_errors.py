"""What torch refuses, we refuse with the same exception type, before anything is written; and the rest clearly."""

import pytest
import torch
from torch.nn import functional as F

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNormAct1d, BatchNormAct2d
from batchnorm.errors import UserError, quote_error
from batchnorm.functional import batch_norm


def x(*shape, **keywords):
    return torch.randn(shape or (4, 3), **keywords)


AS_TORCH = {
    "one value a channel": lambda f: f(x(1, 3), None, None, training=True),
    "one value a channel, spatial": lambda f: f(x(1, 3, 1, 1), None, None, training=True),
    "no buffers in evaluation": lambda f: f(x(), None, None),
    "one buffer of two": lambda f: f(x(), torch.zeros(3), None, training=True),
    "short running_mean": lambda f: f(x(), torch.zeros(2), torch.ones(2), training=True),
    "short weight": lambda f: f(x(), None, None, torch.ones(2), None, True),
    "short bias": lambda f: f(x(), None, None, torch.ones(3), torch.ones(4), True),
    "eps of zero in training": lambda f: f(x(), None, None, training=True, eps=0.0),
    "negative eps": lambda f: f(x(), torch.zeros(3), torch.ones(3), eps=-1.0),
    "integers": lambda f: f(torch.ones(4, 3, dtype=torch.int64), torch.zeros(3), torch.ones(3)),
    "complex": lambda f: f(torch.ones(4, 3, dtype=torch.complex64), torch.zeros(3), torch.ones(3)),
    "double input, float buffers": lambda f: f(x(dtype=torch.float64), torch.zeros(3), torch.ones(3)),
    "float input, half buffers": lambda f: f(x(), torch.zeros(3).half(), torch.ones(3).half()),
    "gradient through a buffer": lambda f: f(x(), torch.zeros(3, requires_grad=True), torch.ones(3), training=True),
    "a number": lambda f: f(1.0, torch.zeros(3), torch.ones(3)),
    "an array": lambda f: f(x().numpy(), torch.zeros(3), torch.ones(3)),
    "no axis in evaluation": lambda f: f(torch.tensor(1.0), torch.zeros(3), torch.ones(3)),
    "no axis in training": lambda f: f(torch.tensor(1.0), None, None, training=True),
    "sparse, evaluation": lambda f: f(x().to_sparse(), torch.zeros(3), torch.ones(3)),
    "sparse, training": lambda f: f(x().to_sparse(), None, None, training=True),
    "vector input": lambda f: f(x(3), torch.zeros(3), torch.ones(3)),
    "input on another device": lambda f: f(x(device="meta"), torch.zeros(3), torch.ones(3)),
}


@pytest.mark.parametrize("name", list(AS_TORCH))
def test_the_same_exception_type_as_torch(name):
    case = AS_TORCH[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # which one it is, torch says
        case(F.batch_norm)
    with pytest.raises(theirs.type):
        case(batch_norm)


def test_messages_say_shape_and_axis():
    with pytest.raises(RuntimeError, match=r"running_mean should contain 5 elements not 3.*\(4, 5\) is axis 1"):
        BatchNorm1d(3)(x(4, 5))
    with pytest.raises(
        ValueError, match=r"Expected more than 1 value per channel when training, got input size.*drop_last"
    ):
        BatchNorm1d(3)(x(1, 3))
    with pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        BatchNorm2d(3)(x())


@pytest.mark.parametrize(
    ("residual", "error"),
    [
        (lambda: x(4, 4), ValueError),
        (lambda: x(1, 3), ValueError),
        (lambda: x(dtype=torch.float64), RuntimeError),
        (lambda: x(device="meta"), RuntimeError),
    ],
)
def test_a_residual_that_does_not_fit(residual, error):
    layer = BatchNormAct1d(3)
    with pytest.raises(error, match="residual"):
        layer(x(), residual())
    assert layer.norm.num_batches_tracked == 0
    assert torch.equal(layer.norm.running_mean, torch.zeros(3))


def test_nothing_is_counted_where_a_call_fails():
    layer = BatchNorm1d(3)
    with pytest.raises(RuntimeError):
        layer(x(4, 5))
    assert layer.num_batches_tracked == 0


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"activation must be None or one of relu, .*; got 'swish'"):
        BatchNormAct1d(3, "swish")
    with pytest.raises(ValueError, match="activation"):
        batch_norm(x(), None, None, training=True, activation="swish")


def test_momentum_none_needs_the_counter():
    with pytest.raises(ValueError, match="num_batches_tracked"):
        batch_norm(x(), torch.zeros(3), torch.ones(3), training=True, momentum=None)


def test_a_buffer_that_overlaps_itself_is_refused():
    mean, var = torch.zeros(1).expand(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="single memory location"):
        batch_norm(x(), mean, var, training=True)
    assert torch.equal(var, torch.ones(3))


def test_a_layer_is_named_by_its_path():
    net = torch.nn.Sequential(torch.nn.Sequential(BatchNorm1d(3)), BatchNormAct1d(3, "relu"))
    with pytest.raises(RuntimeError, match=r"^0\.0 \(BatchNorm1d\(3\)\): running_mean should contain 5"):
        net(x(4, 5))
    with pytest.raises(ValueError, match=r"^1\.norm \(BatchNorm1d\(3\)\): Expected more than 1 value"):
        net[1](x(1, 3))


def test_evaluation_without_running_statistics_is_called_so():
    layer = BatchNorm1d(4, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="keeps no running statistics and normalizes by the batch in eval"):
        layer(x(1, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_nested_tensors_are_told_to_be_padded(layout, training):
    nested = torch.nested.nested_tensor([x(2, 3), x(4, 3)], layout=layout)
    with pytest.raises(NotImplementedError, match="pad it with"):
        BatchNorm1d(3).train(training)(nested)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_a_tensor_in_mkldnn_layout(training, residual):
    """Torch takes and gives it, with its gradient."""
    ours, theirs = BatchNormAct2d(3, "relu").train(training), torch.nn.BatchNorm2d(3).train(training)
    values, g = x(4, 3, 5, 5), x(4, 3, 5, 5)
    mine, other = values.clone().requires_grad_(), values.clone().requires_grad_()
    added = values.to_mkldnn() if residual else None
    out = ours(mine.to_mkldnn(), added)
    want = (theirs(other) + (values if residual else 0)).relu()
    assert out.layout is torch._mkldnn
    torch.testing.assert_close(out.to_dense(), want)
    out.to_dense().backward(g)
    want.backward(g)
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(ours.norm.state_dict(), theirs.state_dict())


def test_escape_sequences_go_as_a_whole():
    assert str(UserError("a \x1b[31;1mred\x1b[0m\nline")) == "a red line"
    assert quote_error(ValueError("\x1b[2K\x1b[1Gdone")) == "ValueError: done"
