"""Libraries that run the training loop: the same network by the same trainer, with torch's layers and with ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from .nets import KINDS, assert_same, assert_same_calls, images, pair

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' own: few workers, no GPU, no logger

NOT_IN_THE_EXTRA = (
    "the extra `interplay` does not install accelerate, which asks for packages that nothing else here uses"
)


def samples() -> torch.Tensor:
    return images(18)


def assert_trained_alike(ours: nn.Module, theirs: nn.Module, steps: int) -> None:
    """Parameters and buffers after the training, and calls in both modes; each batch was counted once."""
    assert ours.get_submodule("stem.1").num_batches_tracked == 3 + steps  # `stir` begins at 3
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()), 1e-9)
    assert_same_calls(ours, theirs, tolerance=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_lightning(kind, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="installed for development by the Makefile")

    class Regression(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    theirs, ours = pair(kind)
    data = samples()
    for net in (ours, theirs):
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", accumulate_grad_batches=3, gradient_clip_val=1.0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Regression(net), DataLoader(data, batch_size=6))
    assert_trained_alike(ours, theirs, steps=6)


class Loss(nn.Module):
    """As transformers asks of a model: the loss is in what it returns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"loss": self.net(x).square().mean()}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_trainer(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="a development dependency: pip install 'batchnorm[dev]'")
    pytest.importorskip("accelerate", reason=NOT_IN_THE_EXTRA)
    theirs, ours = pair(kind)
    data = [{"x": x} for x in samples()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=6, gradient_accumulation_steps=3,
        optim="sgd", learning_rate=0.05, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    for net in (ours, theirs):
        transformers.Trainer(model=Loss(net), args=arguments, train_dataset=data).train()
    assert_trained_alike(ours, theirs, steps=6)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind):
    accelerate = pytest.importorskip("accelerate", reason=NOT_IN_THE_EXTRA)
    theirs, ours = pair(kind)
    data = samples()
    for net in (ours, theirs):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
        model, optimizer, loader = accelerator.prepare(
            net, torch.optim.SGD(net.parameters(), lr=0.05), DataLoader(data, batch_size=6)
        )
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(batch).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
        assert accelerator.unwrap_model(model) is net
    assert_trained_alike(ours, theirs, steps=6)
