"""Networks of many kinds for the corpus, each with a function for its inputs. All train within a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm

CLASSES = 4


def conv(a: int, b: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, stride, size // 2, groups=groups, bias=False)


def mlp(layer: type = nn.BatchNorm1d) -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32, bias=False), layer(32), nn.ReLU(),
        nn.Linear(32, 32, bias=False), layer(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, CLASSES),
    )  # fmt: skip


def our_mlp() -> nn.Module:
    return mlp(batchnorm.BatchNorm1d)


def cnn() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True), conv(16, 32, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, CLASSES),
    )  # fmt: skip


def norm_after_activation() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.ReLU(), nn.BatchNorm2d(16), conv(16, 16, stride=2), nn.ReLU(), nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def residual() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), Block(16), Block(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


class PreActivation(nn.Module):
    """The biases of the convolutions are not redundant, because a sum reads them before any normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.conv1, self.conv2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(x)))
        return self.head(x.mean((2, 3)))


def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.BatchNorm2d(16), nn.ReLU6(),
        conv(16, 16, groups=16), nn.BatchNorm2d(16), nn.ReLU6(), conv(16, 32, 1), nn.BatchNorm2d(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def one_d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 5, bias=False), nn.BatchNorm1d(16), nn.GELU(), nn.Conv1d(16, 16, 3, stride=2, bias=False),
        nn.BatchNorm1d(16), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def three_d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, bias=False), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, bias=False),
        nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 24, bias=False), nn.Linear(24, 24, bias=False), None
        self.head = nn.Linear(24, CLASSES)
        for name in ("first", "second"):
            self.register_buffer(f"{name}_mean", torch.zeros(24))
            self.register_buffer(f"{name}_var", torch.ones(24))
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.ones(24)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(24)))

    def normalized(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (getattr(self, f"{name}_{part}") for part in ("mean", "var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=self.training, momentum=0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalized(self.first(x), "first")
        x = self.normalized(self.second(x), "second")
        return self.head(F.dropout(x, 0.5, self.training))


def discriminator() -> nn.Module:
    """Return the discriminator of DCGAN with its initialization."""
    model = nn.Sequential(
        conv(3, 16, 4, 2), nn.LeakyReLU(0.2), conv(16, 32, 4, 2), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.LazyLinear(CLASSES),
    )  # fmt: skip
    model(torch.randn(2, 3, 12, 12))
    for module in model:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.normal_(module.weight, 1.0, 0.02)
    return model


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ConvTranspose2d(20, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, CLASSES, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        return self.body(noise[:, :, None, None])


class FrozenBackbone(nn.Module):
    """The normalization of the backbone stays in evaluation mode through `.train()`, as in detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Sequential(conv(16, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(16, CLASSES)
        bn = self.backbone[1]
        with torch.no_grad():
            bn.running_mean.uniform_(-1, 1)
            bn.running_var.uniform_(0.2, 3)
            bn.num_batches_tracked += 1000
        bn.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.backbone[1].eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.head(self.backbone(x)))


class Encoder(nn.Module):
    """A transformer with batch normalization over the features of every token, dropout after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.bn1, self.bn2 = nn.BatchNorm1d(16), nn.BatchNorm1d(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.bn1(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        x = self.bn2(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x.mean(1))


class TwoHeads(nn.Module):
    """A model that takes two inputs and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.right = nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.out = nn.Linear(32, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(torch.cat([self.left(left), self.right(right)], 1))}


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETS = {
    "mlp": Net(mlp, (20,)),
    "our mlp": Net(our_mlp, (20,)),
    "cnn": Net(cnn, (3, 8, 8)),
    "norm after activation": Net(norm_after_activation, (3, 8, 8)),
    "residual": Net(residual, (3, 8, 8)),
    "pre-activation": Net(PreActivation, (3, 8, 8)),
    "depthwise": Net(depthwise, (3, 8, 8)),
    "1-D": Net(one_d, (4, 32)),
    "3-D": Net(three_d, (1, 6, 6, 6)),
    "functional": Net(Functional, (20,)),
    "discriminator": Net(discriminator, (3, 12, 12)),
    "generator": Net(Generator, (20,)),
    "frozen backbone": Net(FrozenBackbone, (3, 8, 8)),
    "encoder": Net(Encoder, (10, 6)),
}


def batches_for(net: Net, count: int, size: int, seed: int = 0, spread: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Return batches of samples from `CLASSES` overlapping clusters, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, *net.shape, generator=torch.Generator().manual_seed(7)) * spread
    found = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        found.append((centers[labels] + torch.randn(size, *net.shape, generator=generator), labels))
    return found


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], steps: int, lr: float = 0.02) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model
