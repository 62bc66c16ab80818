"""The doctor's callbacks: they warn once at the end of an epoch, and recalibrate before validation on request."""

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from batchnorm import callbacks
from batchnorm.errors import UserError


def net(momentum=0.9):
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 3)
    )


def loader(shuffle=False):
    x = 3 + 2 * torch.randn(640, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 32, shuffle=shuffle)


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch", reason="installed for development by the Makefile")


def module_of(lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body, self.seen = net(), []

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.seen.append(self.body[1].running_mean.clone())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    return Module()


def fit(lightning, module, *doctors, epochs=2):
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=list(doctors), logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(), loader())
    return [str(w.message) for w in caught if str(w.message).startswith("BN")]


def test_lightning_warns_once(lightning):
    doctor = callbacks.LightningDoctor(ignore="BN2")
    said = fit(lightning, module_of(lightning), doctor)
    assert [line[:5] for line in said] == ["BN102"]
    assert "BN102" in doctor.diagnosis.codes
    assert isinstance(doctor, lightning.Callback)
    assert type(pickle.loads(pickle.dumps(callbacks.LightningDoctor()))) is callbacks.LightningDoctor


def test_lightning_trains_the_same_with_it(lightning):
    states = []
    for doctors in ([], [callbacks.LightningDoctor()]):
        torch.manual_seed(0)
        module = module_of(lightning)
        fit(lightning, module, *doctors)
        states.append(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_lightning_validates_with_the_population(lightning):
    module = module_of(lightning)
    doctor = callbacks.LightningDoctor(recalibrate=True, select="BN102")
    fit(lightning, module, doctor, epochs=1)
    weight, x = module.body[0].weight, torch.cat([x for x, _ in loader()])
    torch.testing.assert_close(module.seen[-1], (x @ weight.T).mean(0).detach(), rtol=1e-4, atol=1e-4)
    assert doctor.recalibration.samples == 640


class HF(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x, labels=None):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_transformers():
    """By its hooks, as the Trainer calls them: the Trainer itself needs accelerate, which is not installed."""
    hf = pytest.importorskip("transformers", reason="a development dependency: pip install 'batchnorm[dev]'")
    doctor, model = callbacks.TransformersDoctor(recalibrate=True), HF()
    batches = [{"x": x, "labels": y} for x, y in loader()]
    control = hf.TrainerControl(should_evaluate=True)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="BN102"):
        doctor.on_epoch_end(None, hf.TrainerState(), control, model=model, train_dataloader=batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert doctor.recalibration.samples == 640
    expected = torch.cat([batch["x"] for batch in batches]) @ model.body[0].weight.T
    torch.testing.assert_close(model.body[1].running_mean, expected.mean(0).detach(), rtol=1e-4, atol=1e-4)
    doctor.on_epoch_end(None, hf.TrainerState(), control, model=model, train_dataloader=batches)  # warns no more
    doctor.recalibration = None
    doctor.on_step_end(None, hf.TrainerState(), hf.TrainerControl(), model=model, train_dataloader=batches)
    assert doctor.recalibration is None
    assert isinstance(doctor, hf.TrainerCallback)


def test_mistakes():
    with pytest.raises(AttributeError, match="Nothing"):
        callbacks.Nothing  # noqa: B018  # the access is what is tested
    with pytest.raises(UserError, match="at least 1"):
        callbacks._LightningDoctor(batches=0)
