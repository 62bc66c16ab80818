"""Statistics of frozen layers are evidence like all others: what they cost decides, whoever froze them."""

import pytest
import torch
from torch import nn

from batchnorm import diagnose, freeze
from batchnorm.model_tools import recalibrate
from tests.doctor.faults import data, faults, norms, trained
from tests.doctor.nets import NETS

STALE = next(call for name, _, call in faults() if name == "cnn, γ and β held, statistics stale")


def accuracy(model, batches):
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def found(diagnosis):
    return [finding for finding in diagnosis.findings if finding.code == "BN202"]


@pytest.mark.parametrize("frozen", [False, True])
def test_an_accuracy_gap_is_an_error(frozen):
    call = STALE()
    model, batches = call["model"], call["batches"]
    if frozen:
        freeze(model)
    findings = found(diagnose(**call))
    assert [(f.module, f.severity) for f in findings] == [("1", "error"), ("4", "error")]
    evidence = findings[0].evidence
    compared = batches[: evidence["samples"] // 32]
    assert evidence["accuracy_running"] == pytest.approx(accuracy(model, compared))
    for layer in norms(model):  # the batches' statistics
        layer.running_mean = layer.running_var = None
    assert evidence["accuracy_batch"] == pytest.approx(accuracy(model.train(False), compared), abs=2e-3)
    assert evidence["accuracy_batch"] > evidence["accuracy_running"] + 0.1


def test_recalibration_mends_it():
    call = STALE()
    recalibrate(call["model"], [x for x, _ in call["batches"]])
    assert not found(diagnose(**call))


def test_without_targets_nobody_can_tell():
    call = STALE()
    diagnosis = diagnose(call["model"], [x for x, _ in call["batches"]])
    assert not found(diagnosis)
    assert "targets" in diagnosis.not_examined["BN202"]


def test_a_live_layer_beside_frozen_ones_keeps_its_own_comparison():
    model = trained(NETS["cnn"]).eval()
    first, last = norms(model)
    first.requires_grad_(False)
    last.running_mean += 2 * last.running_var.sqrt()
    assert [f.module for f in found(diagnose(model, data(NETS["cnn"])))] == ["4"]
    first.running_mean += 3 * first.running_var.sqrt()
    modules = {f.module for f in found(diagnose(model, data(NETS["cnn"])))}
    assert "1" in modules


def test_frozen_statistics_are_evidence_in_training_too():
    model = trained(NETS["cnn"])
    for layer in norms(model):
        layer.running_mean += 3
    freeze(model)
    diagnosis = diagnose(model.train(), data(NETS["cnn"]))
    assert {f.severity for f in found(diagnosis)} == {"error"}
    assert "frozen=True" in found(diagnosis)[0].fix
    recalibrate(model, [x for x, _ in data(NETS["cnn"])], frozen=True)
    assert not found(diagnose(model, data(NETS["cnn"])))


class LookAlike(nn.Module):
    """Multiplies and adds, as torchvision's FrozenBatchNorm2d does."""

    def __init__(self, norm):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())
        self.eps = norm.eps

    def forward(self, x):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


@pytest.mark.parametrize("training", [False, True])
def test_look_alikes_are_evidence_too(training):
    model = trained(NETS["cnn"], 150)
    for name in ("1", "4"):
        setattr(model, name, LookAlike(model.get_submodule(name)))
    batches = data(NETS["cnn"])
    fine = diagnose(model.train(training), batches)
    assert (fine.exit_code, abs(fine.symptom.gap) < 0.05) == (0, True)
    for name in ("1", "4"):
        mean = model.get_submodule(name).running_mean
        mean += 20 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    diagnosis = diagnose(model, batches)
    assert diagnosis.symptom.running == pytest.approx(
        accuracy(model.eval(), batches[: diagnosis.symptom.samples // 32])
    )
    assert (diagnosis.symptom.gap > 0.3, diagnosis.exit_code) == (True, 1)
    assert found(diagnosis)
