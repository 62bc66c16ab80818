"""A trace sees what something holds when the forward is over."""

import torch

from batchnorm import diagnose
from batchnorm.inspect.folding import foldable
from batchnorm.inspect.from_fx import graph_of_trace

from .test_from_run import KEEP, Net


def test_a_held_result_stays():
    for how in ("attribute", "slot", "object", "closure", "global", "queue", "partial"):
        model = Net(KEEP[how]).eval()
        assert not list(foldable(graph_of_trace(model))), how
        assert not diagnose(model, select=["BN402"]).findings, how


def test_a_result_that_is_let_go_folds():
    model = Net(lambda m, h: setattr(m, "last", None)).eval()
    assert [(norm.name, target.name) for norm, target in foldable(graph_of_trace(model))] == [("norm", "conv")]
    assert diagnose(model, select=["BN402"]).findings
    assert torch.is_tensor(model(torch.randn(1, 3, 2, 2)))
