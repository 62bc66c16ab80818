"""Networks for the tests of the model tools, each with one way of writing a forward that tools stumble over."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Registered output first, functional activations and dropout, a skip around a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.features = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.second(x))
        x = F.dropout(x.mean((2, 3)), 0.5, self.training)
        return self.head(torch.tanh(self.features(x)))


class Attention(nn.Module):
    """Query, key, value and output projections over (N, L, F)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head(self.out(weights @ self.v(x)))


class AutoEncoder(nn.Module):
    """Returns a latent that a decoder goes on from: two output layers, one of which feeds others."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.latent = nn.Linear(8, 6), nn.Linear(6, 2)
        self.decode, self.rebuild = nn.Linear(2, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        latent = self.latent(self.encode(x).relu())
        return {"latent": latent, "rebuilt": self.rebuild(self.decode(latent).relu_()).sigmoid()}


class Shared(nn.Module):
    """One hidden layer under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.again = self.one
        self.blocks = nn.ModuleList([self.one])
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.one(x))))
        return self.last(torch.tanh(self.blocks[0](x)))


class TiedHead(nn.Module):
    """The output layer is a function call on the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embed(tokens)), self.embed.weight)


class PreActivation(nn.Module):
    """Batch normalization reached through an addition and a pooling, as in pre-activation nets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.last_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = x + self.conv(F.relu(self.norm(x)))
        return self.head(F.relu(self.last_norm(x)).mean((2, 3)))


class TypeSwitch(nn.Module):
    """Looks at its layers' types: an activation after each Linear it recognizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)])
        self.extra = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear) and layer is not self.layers[-1]:
                x = self.extra(x).relu()
        return x


class Unregistered(nn.Module):
    """Holds a part in a plain dict of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"a": [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]}

    def forward(self, x: Tensor) -> Tensor:
        return self.held["a"][0](x)


def scripted(module: nn.Module) -> nn.Module:
    """The module in TorchScript."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)  # models have such parts all the same
        return torch.jit.script(module)
