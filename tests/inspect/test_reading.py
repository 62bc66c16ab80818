"""One run stands for every input, or `fold` and the doctor leave the model alone and say why."""

from __future__ import annotations

import random

import pytest
import torch

from batchnorm import diagnose, fold

from ..model_tools.test_fold import Block, trained

X = torch.randn(2, 3, 4, 4).double()
DEPENDS = {
    "a condition": lambda m, x: m.norm(m.conv(x)) if x.sum() < 1e9 else m.conv(x),
    "after the layers": lambda m, x: y if (y := m.norm(m.conv(x))).mean() < 1e9 else y * m.conv(x),
    "a loop": lambda m, x: [h := m.norm(m.conv(x)), *(h := h * 0.5 for _ in range(int(h.abs().max())))][-1],
    "numpy": lambda m, x: m.norm(m.conv(x)) if x.numpy().sum() < 1e9 else m.conv(x),
    "a list": lambda m, x: m.norm(m.conv(x)) if x.sum().tolist() < 1e9 else m.conv(x),
    "how many": lambda m, x: m.norm(m.conv(x)) if len(x[x > 0]) else m.conv(x),
    "torch's random numbers": lambda m, x: m.norm(m.conv(x)) if torch.rand(()) < 2 else m.conv(x),
}
PROVEN = {
    "an index by a mask": lambda m, x: (h := m.norm(m.conv(x)))[h > 0],
    "a number that scales": lambda m, x: m.norm(m.conv(x)) * x.mean().item(),
    "places of values": lambda m, x: (m.norm(m.conv(x)), x.nonzero())[0],
}


@pytest.mark.parametrize("flow", DEPENDS)
def test_control_flow_on_data_stays_unless_the_caller_insists(flow, capfd):
    model = trained(Block(DEPENDS[flow]))
    (entry,) = fold(model, (X,)).report.entries
    assert entry.into is None
    assert entry.reason.startswith("control flow depends on the data")
    assert "\n" not in entry.reason
    assert not diagnose(model, [X], select=["BN402"]).findings
    assert capfd.readouterr() == ("", "")
    assert fold(model, (X,), trust_example=True).report.entries[0].into == "conv"


def test_the_other_branch_keeps_its_answer():
    model = trained(Block(DEPENDS["a condition"]))
    big = X + 1e9
    assert torch.equal(fold(model, (X,)).model(big), model(big))


def test_random_control_flow_of_python_stays():
    model = trained(Block(lambda m, x: m.norm(m.conv(x)) if random.random() < 2 else m.conv(x)))
    assert "may be random" in fold(model, (X,)).report.entries[0].reason
    assert fold(model, (X,), trust_example=True).report.folded


@pytest.mark.parametrize("values", PROVEN)
def test_an_exported_program_proves_that_no_value_decides(values):
    model = trained(Block(PROVEN[values]))
    folded, report = fold(model, (X,))
    assert report.folded
    torch.testing.assert_close(folded(-X), model(-X))
    assert diagnose(model, [X], select=["BN402"]).findings


@torch.library.custom_op("batchnorm_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    """An operator that torch.export cannot take: it has no fake."""
    return x + 1


def test_what_export_refuses_for_another_reason_folds():
    model = trained(Block(lambda m, x: opaque(m.norm(m.conv(x)))))
    folded, report = fold(model, (X,))
    assert report.folded
    torch.testing.assert_close(folded(-X), model(-X))
