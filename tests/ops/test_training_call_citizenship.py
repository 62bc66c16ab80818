"""The training call among torch's tools, from Python and from C++: modes, subclasses, tracing, compilers, DDP."""

import copy
import io
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from batchnorm import BatchNorm1d, BatchNormAct1d, execution, layer_call
from tests.ops.training import COMPILED, Problem
from tests.oracle import close

pytestmark = pytest.mark.usefixtures("call")
FORWARD = torch.ops.batchnorm.forward_update_running_.default
BACKWARD = torch.ops.batchnorm.backward.default


@pytest.fixture
def _compiler():
    """torch.compile without memory of the tests before, and left so: what it saw decides which sizes it keeps open."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_see_both_operators(call):
    p = Problem()
    with Log() as log:
        p.out(call).backward(p.grad_output)
    assert [f for f in log.seen if f.namespace == "batchnorm"] == [FORWARD, BACKWARD]


def test_a_mode_in_the_backward_alone(call):
    p = Problem()
    out = p.out(call)
    with Log() as log:
        out.backward(p.grad_output)
    assert log.seen.count(BACKWARD) == 1


def test_flop_counter_counts_both():
    layer, x = nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4)), torch.randn(8, 3, requires_grad=True)
    mapping = {FORWARD.overloadpacket: lambda *_, **__: 7, BACKWARD.overloadpacket: lambda *_, **__: 5}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x).sum().backward()
    assert counter.flop_counts["Global"][FORWARD.overloadpacket] == 7
    assert counter.flop_counts["Global"][BACKWARD.overloadpacket] == 5


def test_fake_tensors():
    with FakeTensorMode():
        layer, x = BatchNormAct1d(3, "relu"), torch.empty(8, 3, 5, requires_grad=True)
        out = layer(x)
        out.sum().backward()
    assert type(x.grad).__name__ == type(out).__name__ == "FakeTensor"
    assert x.grad.shape == out.shape == x.shape


class Wrapped(torch.Tensor):
    """A subclass that holds a tensor and is known to __torch_dispatch__ alone."""

    seen: ClassVar = []
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=False)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapped, func(*args, **kwargs))


def test_a_subclass_goes_through_its_own_dispatch():
    layer = BatchNormAct1d(3, "tanh")
    x, g = torch.randn(8, 3), torch.randn(8, 3)
    wrapped, plain = Wrapped(x).requires_grad_(), x.clone().requires_grad_()
    Wrapped.seen.clear()
    out = copy.deepcopy(layer)(wrapped)
    out.backward(Wrapped(g))
    assert FORWARD in Wrapped.seen
    assert BACKWARD in Wrapped.seen
    layer(plain).backward(g)
    assert torch.equal(wrapped.grad.inner, plain.grad)


def test_many_gradients_at_once(call):
    """`is_grads_batched` runs the backward under vmap, for which the operator has no rule but torch's loop."""
    p = Problem("tanh")
    out, many = p.out(call), torch.randn(4, 8, 3, 5, dtype=torch.float64)
    found = torch.autograd.grad(out, p.input, many, is_grads_batched=True, retain_graph=True)[0]
    want = [torch.autograd.grad(out, p.input, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(found, torch.stack(want))


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_make_fx_traces_the_operators(tracing_mode):
    layer = BatchNormAct1d(3, "relu")

    def f(x, g):
        return torch.autograd.grad(layer(x), x, g)[0]

    x, g = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    graph = make_fx(f, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x, g)
    targets = [node.target for node in graph.graph.nodes]
    assert FORWARD in targets
    assert BACKWARD in targets
    y, h = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    with torch.no_grad():  # the backward is in the graph already
        found = graph(y, h)
    torch.testing.assert_close(found, f(y, h))


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_compiled_autograd_over_an_eager_forward(call, activation, backend):
    for _ in range(2):  # the second from its cache
        p = Problem(activation)
        out = p.out(call)
        with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
            out.backward(p.grad_output)
        for name, want in p.truth().grads.items():
            close(getattr(p, name).grad, want, torch.float64, 100)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_compiles_and_exports_does_not_come_here(monkeypatch):
    def never(*_):
        raise AssertionError("called")

    x = torch.randn(8, 3)
    monkeypatch.setattr(layer_call, "plain_training_call", lambda *_: None)
    monkeypatch.setattr(execution, "training_call", never)
    torch.compile(BatchNorm1d(3), backend="eager", fullgraph=True)(x)
    torch.export.export(BatchNorm1d(3), (x,))
    torch.func.grad(lambda x: BatchNorm1d(3)(x).sin().sum())(x)
    torch.jit.trace(BatchNorm1d(3), (x,), check_trace=False)
    with pytest.raises(AssertionError, match="called"):
        BatchNorm1d(3)(x)


def test_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(4, 3), BatchNormAct1d(3, "relu"), nn.Linear(3, 1))
        alone = copy.deepcopy(net)
        x = torch.randn(8, 4)
        parallel = DistributedDataParallel(net)
        for _ in range(2):
            for model in (parallel, alone):
                model.zero_grad()
                model(x).square().sum().backward()
        del model, parallel  # after the group it would join Gloo's thread with the GIL held, which that may wait for
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_hooks_on_tensors_and_modules():
    layer, x = BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
    seen = []
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_input[0]))
    out = layer(x)
    out.register_hook(lambda g: seen.append(g) or 2 * g)
    out.grad_fn.register_hook(lambda grads, _: None)
    out.backward(torch.ones(8, 3).cumsum(0))
    assert len(seen) == 2
    assert torch.equal(seen[1], x.grad)


def test_layers_are_copied_and_saved_after_a_call():
    layer, x = BatchNorm1d(3), torch.randn(8, 3)
    layer(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), copy.deepcopy(layer)(x))


def test_autocast():
    layer, linear, x = BatchNorm1d(3), nn.Linear(4, 3), torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(linear(x))
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert layer.weight.grad.dtype is torch.float32


def test_the_profiler_shows_the_operators_and_the_call(call):
    p = Problem()
    with profile() as shown:
        p.out(call).backward(p.grad_output)
    names = {event.name for event in shown.events()}
    assert {"batchnorm::forward_update_running_", "batchnorm::backward"} <= names
    assert any("TrainingCall" in name for name in names)


@pytest.mark.skipif(COMPILED is None, reason="csrc/autograd was not built against this torch")
def test_layers_take_the_compiled_one():
    import batchnorm.ops.autograd

    assert batchnorm.ops.autograd.training_call is COMPILED.training_call
