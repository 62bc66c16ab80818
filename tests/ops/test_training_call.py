"""The training call from Python and from C++ (csrc/autograd): one behavior, held in both."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNorm1d, BatchNormAct1d, execution, functional, layer_call
from batchnorm.ops.autograd import python_training_call
from tests.ops.training import COMPILED, NAMES, Problem, grads_of
from tests.oracle import ACTIVATION, close

pytestmark = pytest.mark.usefixtures("call")


@pytest.mark.parametrize("slice_size", [0, 3])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATION)
def test_output_gradients_and_buffers_are_the_truth(call, activation, residual, mask, slice_size):
    p = Problem(activation, residual, mask, slice_size=slice_size)
    want = p.truth()
    out = p.out(call)
    close(out, want.out, torch.float64, 4)
    out.backward(p.grad_output)
    for name, leaf in zip(NAMES, p.leaves(), strict=True):
        if leaf is not None:
            close(leaf.grad, want.grads[name], torch.float64, 100)
    assert p.buffers[2] == 1
    if not slice_size:
        close(p.buffers[0], 0.1 * want.mean[0], torch.float64, 10)


@pytest.mark.skipif(COMPILED is None, reason="csrc/autograd was not built against this torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_both_give_the_same_bits(activation, dtype):
    one = Problem(activation, dtype=dtype)
    torch.manual_seed(0)
    other = Problem(activation, dtype=dtype)
    with torch.no_grad():
        for a, b in zip([*one.leaves(), one.grad_output], [*other.leaves(), other.grad_output], strict=True):
            b.copy_(a)
    for p, which in ((one, python_training_call), (other, COMPILED.training_call)):
        p.out(which).backward(p.grad_output)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(one.leaves(), other.leaves(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers, other.buffers, strict=True))
    assert [b._version for b in one.buffers] == [b._version for b in other.buffers]


SUBSETS = [tuple(name for i, name in enumerate(NAMES) if chosen >> i & 1) for chosen in range(1, 16)]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("activation", ["", "tanh"])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_gradients_of_some_inputs(call, wanted, activation, create_graph):
    p = Problem(activation)
    found, want = grads_of(p, call, wanted, create_graph=create_graph), p.truth().grads
    for name in wanted:
        close(found[name], want[name], torch.float64, 100)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("activation", ["", "tanh"])
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_frozen_inputs(call, wanted, activation, create_graph):
    p = Problem(activation)
    want = p.truth().grads
    for name in set(NAMES) - set(wanted):
        getattr(p, name).requires_grad_(False)
    for name, grad in grads_of(p, call, wanted, create_graph=create_graph).items():
        close(grad, want[name], torch.float64, 100)
    p.out(call).backward(p.grad_output)
    assert {name for name in NAMES if getattr(p, name).grad is not None} == set(wanted)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias"), ("weight", "residual")], ids="+".join)
def test_absent_inputs(call, missing):
    p = Problem("sigmoid")
    for name in missing:
        setattr(p, name, None)
    found = grads_of(p, call, [name for name in NAMES if name not in missing])
    for name, grad in found.items():
        close(grad, p.truth().grads[name], torch.float64, 100)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_residual_without_activation_gets_the_gradient_itself(call, create_graph):
    p = Problem("")
    found = grads_of(p, call, create_graph=create_graph)
    assert found["residual"] is p.grad_output


def test_no_gradient_in_no_gradient_out(call):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    p = Problem()
    Nothing.apply(p.out(call)).sum().backward()
    assert all(leaf.grad is None for leaf in p.leaves())


def test_saved_tensor_hooks_see_every_tensor_kept_and_no_other(call):
    p, packed = Problem(""), []
    with saved_tensors_hooks(lambda t: packed.append(t) or t.numpy(force=True), torch.from_numpy):
        out = p.out(call)
    shapes = [tuple(t.shape) for t in packed]
    assert shapes == [(8, 3, 5), (1, 3), (1, 3), (1,), (3,), (3,)]  # input, mean, var, count, weight, bias
    out.backward(p.grad_output)
    close(p.input.grad, p.truth().grads["input"], torch.float64, 100)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once(use_reentrant):
    layer = BatchNormAct1d(3, "silu").double()
    p = Problem("silu", residual=False)
    p.weight, p.bias = layer.norm.weight, layer.norm.bias
    checkpoint(layer, p.input, use_reentrant=use_reentrant).backward(p.grad_output)
    close(p.input.grad, p.truth().grads["input"], torch.float64, 100)
    assert layer.norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tensor_changed_in_place_is_noticed(call, name):
    p = Problem()
    out = p.out(call)
    with torch.no_grad():
        getattr(p, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(p.grad_output)


def test_buffers_moved_by_a_later_call_are_no_such_change(call):
    p = Problem()
    out = p.out(call)
    p.out(call)
    out.backward(p.grad_output)
    close(p.input.grad, p.truth().grads["input"], torch.float64, 100)


def test_backward_twice(call):
    p = Problem()
    out = p.out(call)
    out.backward(p.grad_output, retain_graph=True)
    once = p.input.grad.clone()
    out.backward(p.grad_output)
    assert torch.equal(p.input.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward(p.grad_output)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("activation", ["", "silu"])
def test_derivatives_of_derivatives(call, activation, mask):
    p = Problem(activation, mask=mask)
    f = lambda *leaves: p.out(call, *leaves)  # noqa: E731
    assert gradcheck(f, p.leaves(), fast_mode=True)
    assert gradgradcheck(f, p.leaves(), fast_mode=True)


def test_a_penalty_on_the_gradient_trains(call):
    """The common use: backward through a gradient that was asked for with create_graph."""
    p = Problem("tanh")
    found = grads_of(p, call, create_graph=True)
    sum(g.square().sum() for g in found.values()).backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in p.leaves())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(call, mode):
    p = Problem()
    with mode():
        out = p.out(call)
    assert not out.requires_grad
    assert out.grad_fn is None
    assert out.is_inference() == (mode is torch.inference_mode)
    assert p.buffers[2] == 1
    close(out, p.truth().out, torch.float64, 4)


def test_the_graph_dies_with_its_output(call):
    p = Problem()
    intermediate = p.input * 1
    out, gone = p.out(call, intermediate, *p.leaves()[1:]), weakref.ref(intermediate)
    del intermediate
    assert gone() is not None
    del out
    gc.collect()
    assert gone() is None


def test_threads_run_backwards_at_once(call):
    layer, failures = BatchNormAct1d(16, "relu"), []
    x = torch.randn(64, 16)

    def work():
        try:
            for _ in range(50):
                leaf = x.clone().requires_grad_()
                layer(leaf).square().sum().backward()
                assert leaf.grad is not None
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert layer.norm.weight.grad.isfinite().all()


def test_second_order_from_another_thread(call):
    p, found = Problem("tanh"), []
    out = p.out(call)
    thread = threading.Thread(
        target=lambda: found.append(torch.autograd.grad(out, p.input, p.grad_output, create_graph=True)[0])
    )
    thread.start()
    thread.join()
    close(found[0], p.truth().grads["input"], torch.float64, 100)
    assert found[0].requires_grad


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_mode_names_the_call(call):
    p = Problem("")
    with torch.autograd.detect_anomaly():
        out = p.out(call)
        with pytest.raises(RuntimeError, match=r"TrainingCall.*returned nan values"):
            out.backward(torch.full_like(out, torch.nan))


class Raises(torch.utils._python_dispatch.TorchDispatchMode):
    """Python's own exception from inside an operator."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is getattr(torch.ops.batchnorm, self.name).default:
            raise FileNotFoundError(f"raised in {self.name}")
        return func(*args, **(kwargs or {}))


def test_an_exception_of_python_comes_through(call):
    p = Problem()
    with Raises("forward_update_running_"), pytest.raises(FileNotFoundError, match="raised in forward_update"):
        p.out(call)
    out = p.out(call)
    with Raises("backward"), pytest.raises(FileNotFoundError, match="raised in backward"):
        out.backward(p.grad_output)


def test_an_exception_from_a_hook_comes_through(call):
    def refuse(_):
        raise FileNotFoundError("no room")

    with saved_tensors_hooks(refuse, lambda t: t), pytest.raises(FileNotFoundError, match="no room"):
        Problem().out(call)


@pytest.mark.skipif(COMPILED is None, reason="csrc/autograd was not built against this torch")
@pytest.mark.parametrize("broken", ["residual", "num_batches_tracked"])
def test_an_exception_of_the_operator_is_the_same(broken):
    p = Problem()
    if broken == "residual":
        p.residual = torch.randn(8, 3, 4, dtype=torch.float64)
    else:  # the average over all batches needs their number
        p.buffers, p.momentum = (*p.buffers[:2], None), None
    said = []
    for which in (python_training_call, COMPILED.training_call):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            p.out(which)
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


def test_wrong_arguments_are_refused(call):
    p = Problem()
    with pytest.raises((TypeError, RuntimeError)):
        call(3.0, *p.leaves()[1:], None, *p.buffers, 0.1, False, *p.form)
    with pytest.raises((TypeError, RuntimeError)):
        call(*p.leaves(), None, *p.buffers, "much", False, *p.form)


def test_layers_come_through_it(call, monkeypatch):
    seen = []
    monkeypatch.setattr(layer_call, "plain_training_call", lambda *_: None)
    monkeypatch.setattr(execution, "training_call", lambda *a: seen.append(a) or call(*a))
    layer, x = BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    layer(x).sum().backward()
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())  # lies elsewhere from now on
    layer(x).sum().backward()
    functional.batch_norm(x, torch.zeros(3), torch.ones(3), training=True)
    assert len(seen) == 3
    assert layer.parametrizations.weight.original.grad is not None
    assert batchnorm.BatchNorm1d(3)(x).grad_fn is not None
