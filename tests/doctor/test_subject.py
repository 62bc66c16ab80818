"""What a target may be: here the LightningModule, whose loaders, optimizer and step are used."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import diagnose
from batchnorm.doctor.lightning_modules import arguments_of_lightning, is_lightning
from batchnorm.doctor.subject import make_step
from batchnorm.errors import UserError


def module_of(optimizers):
    lightning = pytest.importorskip("lightning.pytorch", reason="installed for development by the Makefile")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, index):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return {"loss": loss}

        def configure_optimizers(self):
            return optimizers(torch.optim.Adam(self.parameters(), weight_decay=0.1))

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.randn(65, 8), torch.randint(3, (65,))), 32)

    return Module()


@pytest.mark.parametrize(
    "optimizers",
    [lambda o: o, lambda o: [o], lambda o: ([o], []), lambda o: {"optimizer": o}],
    ids=["one", "list", "with schedulers", "dict"],
)
def test_a_lightning_module_says_it_all(optimizers):
    module = module_of(optimizers)
    assert is_lightning(module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    diagnosis = diagnose(module, **arguments_of_lightning(module))
    assert diagnosis.codes >= {"BN101", "BN104", "BN201"}
    assert "BN305" in diagnosis.examined
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_plain_module_is_none():
    assert not is_lightning(nn.Linear(3, 3))


def test_a_step_of_any_parameters(tmp_path, monkeypatch):
    (tmp_path / "loops.py").write_text(
        "def one(batch): return [batch]\ndef two(model, batch): return [model, batch]\n"
        "def three(model, optimizer, batch): return [model, optimizer, batch]\ndef none(): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    assert make_step("loops.py:one", 1, 2)(3) == [3]
    assert make_step("loops.py:two", 1, 2)(3) == [1, 3]
    assert make_step("loops.py:three", 1, 2)(3) == [1, 2, 3]
    for name, optimizer in (("none", 2), ("three", None)):
        with pytest.raises(UserError, match="step"):
            make_step(f"loops.py:{name}", 1, optimizer)
