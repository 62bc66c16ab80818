"""The monitor's numbers against float64, its accounting of passes, and that it leaves no trace."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import Monitor
from batchnorm.callbacks import lightning_callback, transformers_callback
from batchnorm.errors import UserError


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def images(n=16):
    return torch.randn(n, 3, 8, 8)


def train(model, steps, parts=1, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        for x in images().chunk(parts):
            model(x).square().mean().backward()
        optimizer.step()


def test_percentiles_are_those_of_the_output():
    model, x = net(), images()
    with Monitor(model) as monitor:
        model(x)
    expected = model[1](model[0](x)).detach().double().quantile(torch.tensor([0.15, 0.5, 0.85]).double())
    (row,) = monitor.rows
    torch.testing.assert_close(torch.tensor([row.p15, row.p50, row.p85]).double(), expected, rtol=1e-5, atol=1e-5)


def rms(t):
    return float(t.square().mean().sqrt())


def test_drift_and_lag():
    model = net()
    bn = model[1]
    with Monitor(model, every=1) as monitor:
        model(images())
        before = (bn.running_mean.double().clone(), bn.running_var.double().clone())
        x = images()
        model(x)
    sigma = (bn.running_var.double() + bn.eps).sqrt()
    batch = model[0](x).detach().double().mean((0, 2, 3))
    row = monitor.rows[-1]
    assert row.drift == pytest.approx(rms((bn.running_mean - before[0]) / sigma), rel=1e-4)
    assert row.log2_drift == pytest.approx(rms((sigma.square() / (before[1] + bn.eps)).log2()), rel=1e-4)
    assert row.lag == pytest.approx(rms((batch - bn.running_mean) / sigma), rel=1e-4)


@pytest.mark.parametrize(("correlation", "low", "high"), [(0.0, 0.7 * 32 * 36, 32 * 36), (1.0, 31, 34)])
def test_effective_samples(correlation, low, high):
    """Positions that are independent count each; positions that are equal count once."""
    model = nn.BatchNorm2d(64)
    x = torch.randn(32, 64, 6, 6) if not correlation else torch.randn(32, 64, 1, 1).expand(32, 64, 6, 6)
    with Monitor(model) as monitor:
        model(x)
    assert low <= monitor.rows[0].effective <= high
    assert monitor.rows[0].values == 32 * 36


def test_sampling():
    model = net()
    with Monitor(model, every=5) as monitor:
        train(model, 11)
        model.eval()(images())
    assert [row.step for row in monitor.rows] == [1, 6, 11]
    assert [row.updates_a_step for row in monitor.rows[1:]] == [1.0, 1.0]


def test_accumulation_and_passes_without_gradient():
    model = net()
    with Monitor(model) as monitor:
        train(model, 3, parts=4)
        with torch.no_grad():
            model(images())
    assert monitor.accounting()["1"] == {"with gradient": 12, "without gradient": 1, "repeated": 0, "a step": 4.0}


@pytest.mark.parametrize(("layer", "updates"), [(nn.BatchNorm1d, 2.0), (batchnorm.BatchNorm1d, 1.0)])
def test_checkpointing(layer, updates):
    """torch's layer counts the repeated forward, ours does not: the layer's own counter tells."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8, bias=False), layer(8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with Monitor(model, every=1) as monitor:
        for _ in range(3):
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
    assert monitor.accounting()["body.1"]["repeated"] == 3
    assert monitor.rows[-1].updates_a_step == updates


def test_training_is_the_same_with_it():
    results = []
    for watched in (False, True):
        torch.manual_seed(3)
        model = net()
        if watched:
            with Monitor(model, every=2):
                train(model, 6)
        else:
            train(model, 6)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_no_hook_is_left_even_after_an_exception():
    model = net()
    with pytest.raises(RuntimeError, match="as asked"), Monitor(model):
        raise RuntimeError("as asked")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Recorder:
    def __init__(self):
        self.written = {}

    def add_scalar(self, tag, value, step):
        self.written[tag, step] = value


def test_writer_and_table():
    model, writer = net(), Recorder()
    with Monitor(model, every=2, writer=writer) as monitor:
        train(model, 3)
    assert writer.written["batchnorm/1/p50", 3] == monitor.rows[-1].p50
    assert "batchnorm/1/updates_a_step" in {tag for tag, _ in writer.written}
    heading, line = monitor.table().splitlines()
    assert heading.split()[:2] == ["layer", "step"]
    assert line.split()[:2] == ["1", "3"]


def test_mistakes():
    with pytest.raises(UserError, match="no batch normalization"):
        Monitor(nn.Linear(2, 2))
    with pytest.raises(UserError, match="every"):
        Monitor(net(), every=0)


def test_the_callback_for_transformers():
    """The library's own handler calls the events, as its Trainer does."""
    handlers = pytest.importorskip("transformers.trainer_callback", reason="a development dependency")
    model = net()
    callback = transformers_callback(every=1)
    handler = handlers.CallbackHandler([callback], model, None, None, None)
    state, control = handlers.TrainerState(), handlers.TrainerControl()
    handler.on_train_begin(None, state, control)
    train(model, 2)
    handler.on_train_end(None, state, control)
    assert len(callback.monitor.rows) == 2
    train(model, 1)
    assert len(callback.monitor.rows) == 2


def test_the_callback_for_lightning_by_its_documented_hooks(monkeypatch):
    """With the real library where it is installed, else with a base of the documented hook's signatures."""
    if not any(name in sys.modules or _installed(name) for name in ("lightning", "pytorch_lightning")):
        callbacks = type(sys)("lightning.pytorch.callbacks")
        callbacks.Callback = object
        for name in ("lightning", "lightning.pytorch"):
            monkeypatch.setitem(sys.modules, name, type(sys)(name))
        monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", callbacks)
    model, callback = net(), lightning_callback(every=1)
    callback.on_train_start(None, model)
    for number in range(2):
        callback.on_train_batch_start(None, model, None, number)
        train(model, 1)
    callback.on_train_end(None, model)
    assert [row.step for row in callback.monitor.rows] == [1, 2]


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_callbacks_without_the_libraries(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.callbacks", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for make in (lightning_callback, transformers_callback):
        with pytest.raises(UserError, match="not installed"):
            make()


def test_importing_takes_no_trainer():
    code = "import sys, batchnorm.callbacks; print('transformers' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "False"]


def test_memory_of_a_step():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 2, 3))
    with Monitor(model, every=2) as monitor:
        train(model, 3)
    before, after = 16 * 4 * 6 * 6 * 4, 16 * 4 * 6 * 6 * 4  # what the normalization read, what sigmoid and conv keep
    vectors = 2 * 4 * 4  # torch's saved mean and invstd
    assert monitor.memory is not None
    assert (monitor.memory.normalizations, monitor.memory.others) == (before, after + vectors)
    assert monitor.memory.peak > before
    assert str(monitor.memory).startswith("kept by normalizations 0.0 MB, by others 0.0 MB, at the peak ")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own look at a hook's argument
def test_memory_is_not_counted_in_a_compiled_model_and_a_forward_that_raises_ends_the_count():
    model = torch.compile(net(), backend="eager")
    with Monitor(model, every=1) as monitor:
        model(images()).sum().backward()
    assert monitor.memory is None
    model = net()
    with Monitor(model, every=1) as monitor:
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 5, 8, 8))
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        model(images())
    assert monitor.memory is not None
