"""torch.fx: what a trace holds, and that mode, buffers and hooks are looked at when the graph runs."""

from __future__ import annotations

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental import optimization

import batchnorm

from .nets import KINDS, assert_same_calls, images, pair


def called(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_and_activation_is_a_module_of_the_graph(kind):
    theirs, ours = pair(kind)
    graph = fx.symbolic_trace(ours)
    assert called(graph) == called(fx.symbolic_trace(theirs))
    assert {"stem.1", "stem.2", "block.1.norm", "block.1.act", "norm", "head.2"} <= set(called(graph))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("traced_in", [True, False])
def test_modes_after_the_trace(kind, traced_in):
    """.train() and .eval() of the graph, and not the mode it was traced in, say which statistics a call takes."""
    theirs, ours = pair(kind)
    assert_same_calls(fx.symbolic_trace(ours.train(traced_in)), theirs, modes=(True, False, True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_may_stay_in_eval(kind):
    theirs, ours = pair(kind)
    graph = fx.symbolic_trace(ours)
    for model in (graph, theirs):
        model.train()
        model.get_submodule("stem.1").eval()
    x = images()
    torch.testing.assert_close(graph(x), theirs(x))
    torch.testing.assert_close(graph.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_at_the_run_and_not_at_the_trace(kind):
    theirs, ours = pair(kind)
    logs = []
    for model in (ours, theirs):
        seen = []
        for name in ("stem.1", "stem.2", "block.1.norm", "block.1.act", "head.2"):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda m, args, s=seen, n=name: s.append((n, "pre", args[0].clone())))
            module.register_forward_hook(lambda m, args, out, s=seen, n=name: s.append((n, "post", out.clone())))
        graph = fx.symbolic_trace(model)
        assert not seen
        graph(images().fill_(0.5))
        logs.append(seen)
    assert [entry[:2] for entry in logs[0]] == [entry[:2] for entry in logs[1]]
    assert len(logs[0]) == 10
    for ours_saw, theirs_saw in zip(*logs, strict=True):
        torch.testing.assert_close(ours_saw[2], theirs_saw[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, fx.symbolic_trace, lambda graph: pickle.loads(pickle.dumps(graph))],
    ids=["deepcopy", "trace again", "pickle"],
)
def test_a_graph_is_copied_and_traced_again(kind, change):
    theirs, ours = pair(kind)
    graph = change(fx.symbolic_trace(ours))
    assert_same_calls(graph, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_fxs_own_fuser_leaves_the_function_alone(kind):
    theirs, ours = pair(kind)
    fused = optimization.fuse(ours.eval())
    x = images()
    torch.testing.assert_close(fused(x), theirs.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_fxs_own_fuser_folds_a_reverted_model():
    theirs, ours = pair("convert")
    fused, expected = (optimization.fuse(model.eval()) for model in (batchnorm.revert(ours), theirs))
    assert called(fused) == called(expected)
    assert len(called(fused)) < len(called(fx.symbolic_trace(theirs)))
    x = images()
    torch.testing.assert_close(fused(x), expected(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["", "stem"])
@pytest.mark.filterwarnings(
    "ignore:Was not able to save the following children modules as reprs:UserWarning"
)  # its own
def test_the_code_that_to_folder_writes_runs(kind, part, tmp_path):
    """Also where the root itself is an nn.Sequential with a call of ours: its signature is copied into the code."""
    theirs, ours = (model.get_submodule(part).eval() for model in pair(kind, torch.float32))
    fx.symbolic_trace(ours).to_folder(tmp_path, "Written")
    spec = importlib.util.spec_from_file_location("written", tmp_path / "module.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written, x = module.Written().eval(), images(dtype=torch.float32)
    torch.testing.assert_close(written(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_revert_of_a_graph():
    """The modules of a graph are replaced as those of any model."""
    theirs, ours = pair("convert")
    graph = batchnorm.revert(fx.symbolic_trace(ours))
    assert type(graph.stem.get_submodule("1")) is nn.BatchNorm2d
    assert_same_calls(graph, theirs)


def test_convert_of_a_graph():
    theirs, _ = pair("convert")
    graph = batchnorm.convert(fx.symbolic_trace(copy.deepcopy(theirs)))
    assert isinstance(graph.get_submodule("stem.1"), batchnorm.BatchNorm2d)
    assert_same_calls(graph, theirs)


def test_a_mask_through_a_trace():
    """A model that hands a mask on: the mask is an input of the graph too."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm.BatchNormAct1d(3, "silu")

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    model = Masked().double()
    graph = fx.symbolic_trace(copy.deepcopy(model))
    x, mask = torch.randn(4, 3, 5).double(), torch.rand(4, 5) > 0.3
    torch.testing.assert_close(graph(x, mask), model(x, mask))
    torch.testing.assert_close(graph.state_dict(), model.state_dict())
