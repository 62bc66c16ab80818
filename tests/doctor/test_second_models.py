"""Models that a step uses beside the examined one: found by the names that the step has for them, and put back."""

import copy
import functools

import pytest
import torch
from torch import nn

from batchnorm import diagnose
from batchnorm.doctor.evidence.second_models import models_of
from tests.doctor.faults import data, taught
from tests.doctor.nets import NETS

GLOBAL = nn.BatchNorm1d(3)


class Trainer:
    def __init__(self):
        self.model, self.ema = nn.BatchNorm1d(3), {"teacher": nn.BatchNorm1d(3)}

    def step(self, batch):
        return self.model(batch)

    __call__ = step


def test_where_a_step_holds_its_models():
    trainer, local = Trainer(), nn.BatchNorm1d(3)

    def step(batch):
        return local(batch) + GLOBAL(batch) + trainer.model(batch)

    assert models_of(step) == {"local": local, "GLOBAL": GLOBAL, "trainer.model": trainer.model}
    held = {"model": trainer.model, "ema.teacher": trainer.ema["teacher"]}
    assert models_of(trainer.step) == held
    assert models_of(trainer) == held
    assert models_of(functools.partial(step, teacher=local))["teacher"] is local
    assert models_of(print) == {}


def state(module):
    return [t.detach().clone() for t in module.state_dict().values()], [p.grad for p in module.parameters()]


@pytest.mark.parametrize("known", [True, False])
def test_a_teacher_comes_back_as_it_was(known):
    call = taught(NETS["cnn"], "no_grad")
    inner, hidden = call["step"], []
    teacher = models_of(inner)["teacher"]
    if not known:  # in a place where nobody looks: it is met when it is called
        hidden.append([copy.deepcopy(teacher)])
        teacher = hidden[0][0]

        def step(batch):
            with torch.no_grad():
                hidden[0][0](batch[0])
            inner(batch)

        call["step"] = step
    before = state(teacher)
    found = [f.module for f in diagnose(**call).findings if f.code == "BN305"]
    name = "teacher" if known else "Sequential"
    assert {f"{name}.1", f"{name}.4"} <= set(found)
    for a, b in zip(before[0], state(teacher)[0], strict=True):
        assert torch.equal(a, b)
    assert before[1] == state(teacher)[1]


def test_a_teacher_inside_the_model():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = NETS["cnn"].make(), NETS["cnn"].make()

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) - target

    model = Both()
    diagnosis = diagnose(model, data(NETS["cnn"], 4), step=lambda batch: model(batch[0]).square().mean().backward())
    assert [f.module for f in diagnosis.findings if f.code == "BN305"] == ["teacher.1", "teacher.4"]
    model.teacher.eval()
    diagnosis = diagnose(model, data(NETS["cnn"], 4), step=lambda batch: model(batch[0]).square().mean().backward())
    assert "BN305" not in diagnosis.codes
