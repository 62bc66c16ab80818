"""Checkpoints of every form that people have, alone and with the model; damaged and pickled ones get one line."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchnorm import diagnose
from batchnorm.doctor.checkpoints import load_state, read_state
from batchnorm.errors import UserError


def net(**bn):
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8, **bn), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture
def model():
    model = net()
    for _ in range(5):
        model(torch.randn(16, 4))
    return model


def prefixed(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


FORMS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": prefixed("model.")(state), "pytorch-lightning_version": "2.6"},
    "optimizer beside it": lambda state: {"optimizer": {"state": {}}, "model_state_dict": state},
    "DistributedDataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled in DistributedDataParallel": prefixed("module._orig_mod."),
    "average": lambda state: {"n_averaged": torch.tensor(3), **prefixed("module.")(state)},
    "ema": lambda state: {"ema": state},
    "without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "average"])
def test_every_form(model, tmp_path, form):
    torch.save(FORMS[form](model.state_dict()), tmp_path / "a.ckpt")
    other = net()
    load_state(other, tmp_path / "a.ckpt")
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value) or key.endswith("num_batches_tracked"), key
    assert "BN107" in diagnose(str(tmp_path / "a.ckpt")).examined


def test_an_average(model, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(model)
    torch.save(average.state_dict(), tmp_path / "a.pt")
    other = net()
    load_state(other, tmp_path / "a.pt")
    assert torch.equal(other[1].running_mean, model[1].running_mean)


def test_safetensors(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    other = net()
    load_state(other, tmp_path / "a.safetensors")
    assert torch.equal(other[1].running_mean, model[1].running_mean)


def test_alone(tmp_path):
    state = net().half().state_dict()
    state["1.running_var"][2] = float("nan")
    torch.save({"state_dict": {"m." + k: v for k, v in state.items()}}, tmp_path / "a.pth")
    diagnosis = diagnose(str(tmp_path / "a.pth"))
    assert {(f.code, f.module) for f in diagnosis.findings} == {("BN107", "m.1"), ("BN112", "m.1")}
    assert {"BN401", "BN402", "BN202"} <= set(diagnosis.not_examined)
    torch.save(net().state_dict(), tmp_path / "new.pt")
    assert diagnose(str(tmp_path / "new.pt")).codes == {"BN106"}


def test_others_are_refused(model, tmp_path):
    before = copy.deepcopy(net().state_dict())
    wrong = {
        "none": None,
        "damaged": b"PK\x03\x04 and no more",
        "pickled": model,
        "empty": {},
        "a number": 3,
        "another": nn.Linear(3, 3).state_dict(),
        "wider": net(affine=False).state_dict(),
        "another shape": {**model.state_dict(), "0.weight": torch.ones(8, 5)},
    }
    for name, content in wrong.items():
        path = tmp_path / f"{name}.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        other = net()
        other.load_state_dict(before)
        with pytest.raises(UserError) as raised:
            load_state(other, path)
        assert str(raised.value).isprintable()
        assert f"load_state(state={path})" in str(raised.value), name
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_damaged_is_not_called_pickled(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"garbage" * 100)
    with pytest.raises(UserError, match=r"^damaged"):
        read_state(tmp_path / "a.ckpt")


def test_nothing_in_a_file_runs(tmp_path):
    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"model": Bad()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="pickled"):
        read_state(tmp_path / "a.pt")
    assert not (tmp_path / "written").exists()
