"""The symptom comes first: no gap of ten points passes, whatever the mode, the freezing and the number of samples."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import diagnose, freeze
from batchnorm.doctor.evidence.answers import Answers
from batchnorm.doctor.evidence.comparison import compare
from batchnorm.errors import UserError
from tests.doctor.faults import data, norms, trained
from tests.doctor.nets import NETS

CNN = NETS["cnn"]


@pytest.fixture(scope="module")
def good():
    return trained(CNN, 150).eval()


def spoiled(good, count=6):
    """A model of 0.9 by the batches' statistics and of chance by its running ones, and few samples."""
    model = copy.deepcopy(good)
    for layer in norms(model):
        layer.running_mean += torch.randn(layer.num_features, generator=torch.Generator().manual_seed(3)) * 20
    return model, data(CNN, count)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [2, 6, 36])
def test_a_large_gap_is_found_in_any_mode(good, training, frozen, count):
    model, batches = spoiled(good, count)
    model = (freeze(model) if frozen else model).train(training)
    diagnosis = diagnose(model, batches)
    assert diagnosis.symptom.gap > 0.3
    assert diagnosis.exit_code == 1
    assert {f.code for f in diagnosis.findings if f.severity == "error"} == {"BN202"}


@pytest.mark.parametrize("training", [False, True])
def test_a_good_model_ends_with_0(good, training):
    diagnosis = diagnose(copy.deepcopy(good).train(training), data(CNN))
    assert (diagnosis.exit_code, diagnosis.could_not_look) == (0, {})
    assert diagnosis.symptom.scale == "accuracy"
    assert diagnosis.symptom.low <= diagnosis.symptom.gap <= diagnosis.symptom.high < 0.1


def test_the_numbers_are_those_of_the_model(good):
    model, batches = spoiled(good, 36)
    symptom = diagnose(model, batches).symptom
    compared = batches[: symptom.samples // 32]
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in compared)
    assert symptom.running == pytest.approx(right / symptom.samples)
    assert f"running {symptom.running:.3f}" in str(symptom)
    assert f"n = {symptom.samples}" in str(symptom)


def test_initial_statistics_of_a_trained_model_in_training_mode(good):
    """A state without its buffers: nothing tells the model from a new one but its answers."""
    model = copy.deepcopy(good).train()
    for layer in norms(model):
        layer.reset_running_stats()
    with torch.no_grad():
        scales = 4 * torch.randn(32, 1, 1, 1, generator=torch.Generator().manual_seed(3))
        model[3].weight *= scales.exp()  # initial statistics are far from its results, those of the batches are not
    diagnosis = diagnose(model, data(CNN))
    assert (diagnosis.symptom.gap > 0.3, diagnosis.exit_code) == (True, 1)


def test_a_training_that_has_begun_is_not_blamed_and_not_cleared():
    diagnosis = diagnose(trained(NETS["mlp"], 5), data(NETS["mlp"]))
    assert diagnosis.symptom.gap > 0.1
    assert [f for f in diagnosis.findings if f.severity != "info"] == []
    assert diagnosis.exit_code == 3
    assert "train on" in diagnosis.could_not_look["BN202"]


def test_too_few_samples_are_no_all_clear(good):
    (x, y), *_ = data(CNN, 1)
    diagnosis = diagnose(copy.deepcopy(good), [(x[:12], y[:12])])
    assert diagnosis.exit_code == 3
    assert "12 samples do not tell" in diagnosis.could_not_look["BN202"]
    assert "could not look: BN202" in str(diagnosis)


def test_outputs_alone_give_a_distance(good):
    inputs = [x for x, _ in data(CNN)]
    fine, bad = diagnose(copy.deepcopy(good), inputs), diagnose(spoiled(good)[0].train(), inputs[:6])
    assert (fine.exit_code, fine.symptom.scale) == (0, "answers")
    assert "no targets" in str(fine.symptom)
    assert bad.exit_code in (1, 3)
    assert bad.symptom.effect > 0.5


def test_answers_that_cannot_be_compared(good):
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = copy.deepcopy(good)

        def forward(self, x):
            return self.body(x).argmax(1)

    diagnosis = diagnose(Labels().eval(), data(CNN))
    assert diagnosis.exit_code == 3
    assert "compared" in diagnosis.could_not_look["BN202"]


def test_a_model_alone_ends_with_0():
    assert diagnose(CNN.make()).exit_code == 0


def test_two_lines_say_what_was_examined():
    lines = str(diagnose(CNN.make(), data(CNN))).splitlines()
    assert lines[0].startswith("symptom: ")
    assert lines[-2].startswith("examined: BN101")
    assert lines[-1].startswith("not examined: BN104: needs optimizer; ")


def test_a_metric(good):
    model, batches = spoiled(good)
    by_sample = diagnose(model, batches, metric=lambda out, y: (out.argmax(1) == y).double()).symptom
    assert by_sample.scale == "metric"
    assert by_sample.running == pytest.approx(diagnose(model, batches).symptom.running)
    assert diagnose(model, batches, metric=lambda out, y: float((out.argmax(1) == y).double().mean())).exit_code
    with pytest.raises(UserError, match="the metric raises"):
        diagnose(model, batches, metric=lambda out, y: 1 / 0)
    with pytest.raises(UserError, match="metric is a int"):
        diagnose(model, batches, metric=3)


TARGETS = {
    "labels": (torch.tensor([[2.0, 1], [0, 1]]), torch.tensor([0, 0]), "accuracy", [1, 0]),
    "one-hot": (torch.tensor([[2.0, 1], [0, 1]]), torch.tensor([[1.0, 0], [1, 0]]), "accuracy", [1, 0]),
    "a logit": (torch.tensor([[2.0], [-1]]), torch.tensor([1, 1]), "accuracy", [1, 0]),
    "a probability": (torch.tensor([0.9, 0.2]), torch.tensor([1.0, 1]), "accuracy", [1, 0]),
    "pixels": (torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long), "accuracy", None),
    "tokens": (torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.long), "accuracy", None),
    "numbers": (torch.tensor([[2.0], [5]]), torch.tensor([[3.0], [7]]), "squared error", [1, 4]),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_of_every_kind(kind):
    output, target, scale, scores = TARGETS[kind]
    answers = Answers()
    answers.add(output, target)
    assert answers.scale == scale
    assert len(answers.scores[0]) == 2
    assert scores is None or answers.scores[0].tolist() == scores


def _comparison(batch, running):
    answers = []
    for rights in (batch, running, batch):
        answers.append(Answers(values=[torch.ones(3).double()], scores=[torch.tensor(rights).double()]))
        answers[-1].scale = "accuracy"
    return compare(*answers, len(batch))


def test_the_interval_covers_the_gap():
    """Of 300 draws of 80 samples with a true gap of 0.15, 99 % intervals miss it a few times at most."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(300):
        u = torch.rand(80, generator=generator)
        found = _comparison((u < 0.8).tolist(), ((u < 0.6) | (u > 0.95)).tolist())
        missed += not found.low <= 0.15 <= found.high
    assert missed <= 9


def test_no_difference_in_few_samples_is_not_certainty():
    assert _comparison([1] * 12, [1] * 12).undecided
    assert not _comparison([1] * 100, [1] * 100).undecided
