"""Batches of every form that is accepted, and of forms that are refused."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import diagnose
from batchnorm.doctor.evidence.input_batches import as_batch
from batchnorm.errors import UserError
from tests.doctor.nets import TwoHeads


def net():
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def x(n=32):
    return torch.randn(n, 8)


def y(n=32):
    return torch.randint(3, (n,))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, features, scale=None, **ignored):
        return self.body(features if scale is None else features * scale)


FORMS = {
    "tensors": (net, lambda: [x(), x()]),
    "a generator": (net, lambda: (x() for _ in range(3))),
    "a tuple": (net, lambda: (x(), x())),
    "input and target": (net, lambda: [(x(), y())]),
    "lists of input and target": (net, lambda: [[x(), y()]]),
    "a loader": (net, lambda: DataLoader(TensorDataset(x(64), y(64)), 32, shuffle=True)),
    "three entries": (net, lambda: [(x(), y(), torch.ones(32))]),
    "keywords": (Keywords, lambda: [{"features": x(), "scale": torch.ones(32, 1), "other": y()}]),
    "a dict of another name": (net, lambda: [{"x": x(), "target": y()}]),
    "two inputs": (TwoHeads, lambda: [(torch.randn(32, 8), torch.randn(32, 6))]),
    "two inputs and a target": (TwoHeads, lambda: [(torch.randn(32, 8), torch.randn(32, 6), y())]),
    "inputs together, and a target": (TwoHeads, lambda: [((torch.randn(32, 8), torch.randn(32, 6)), y())]),
    "a dict and a target": (TwoHeads, lambda: [({"left": torch.randn(32, 8), "right": torch.randn(32, 6)}, y())]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    make, batches = FORMS[form]
    diagnosis = diagnose(make(), batches())
    assert {"BN108", "BN110", "BN201", "BN203"} <= set(diagnosis.examined)


def test_an_endless_generator_ends():
    def endless():
        while True:
            yield torch.randn(512, 8)

    assert "BN202" in diagnose(net(), endless()).examined


WRONG = {
    "a tensor": lambda: x(),
    "a dict": lambda: {"x": x()},
    "a number": lambda: 3,
    "text": lambda: "digits",
    "nothing in it": list,
    "a spent generator": lambda: iter(()),
    "arrays": lambda: [x().numpy()],
    "numbers": lambda: [1, 2],
    "None": lambda: [None],
    "another width": lambda: [torch.randn(32, 9)],
    "another kind": lambda: [torch.zeros(32, 8, dtype=torch.int64)],
}


@pytest.mark.parametrize("form", WRONG)
def test_wrong_forms(form):
    with pytest.raises(UserError) as raised:
        diagnose(net(), WRONG[form]())
    assert "\n" not in str(raised.value)


def test_a_generator_that_raises():
    def failing():
        yield x()
        raise OSError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        diagnose(net(), failing())


def test_fewer_batches_than_promised():
    class Short(list):
        def __len__(self):
            return 10

    with pytest.raises(UserError, match="end after 2 of the 10"):
        diagnose(net(), Short([x(), x()]))


def test_what_the_model_is_called_with():
    batch = as_batch((x(4), y(4)), net())
    assert batch.size == 4
    assert len(batch.args) == 1
    assert batch.target.shape == (4,)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 1.5}, {"optimizer": "adam"}, {"step": 3, "batches": []}, {"step": print}, {"mask": 3}],
)
def test_wrong_arguments(wrong):
    with pytest.raises(UserError):
        diagnose(net(), **wrong)


def test_no_model():
    with pytest.raises(UserError, match="int"):
        diagnose(3)


def test_what_was_not_given_is_listed():
    diagnosis = diagnose(net(), [x()])
    assert set(diagnosis.not_examined) >= {"BN104", "BN205", "BN206", "BN301", "BN303", "BN304", "BN401"}
    assert not set(diagnosis.not_examined) & set(diagnosis.examined)
    for code, reason in diagnosis.not_examined.items():
        assert f"{code}: {reason}" in str(diagnosis)


def test_select_and_ignore():
    assert diagnose(net(), select="BN101").examined == ("BN101",)
    assert set(diagnose(net(), select=["BN1"], ignore=["BN101"]).examined) <= {f"BN1{n:02}" for n in range(2, 13)}
    with pytest.raises(UserError, match="BN9"):
        diagnose(net(), select="BN9")
