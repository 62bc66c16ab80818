"""What the five examples share: data with something to learn, a training loop, and a report of before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import Monitor, diagnose

CLASSES, FEATURES = 4, 20
Batches = list[tuple[Tensor, Tensor]]


def data(batches: int, size: int = 64, seed: int = 0) -> Batches:
    """Four overlapping clusters that do not lie around zero."""
    centers = 2.0 + torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        found.append((centers[labels] + torch.randn(size, FEATURES, generator=generator), labels))
    return found


def network(dropout_first: bool = False, **batch_norm: float) -> nn.Sequential:
    torch.manual_seed(0)
    before, after = (nn.Dropout(0.5), nn.Identity()) if dropout_first else (nn.Identity(), nn.Dropout(0.5))
    return nn.Sequential(
        nn.Linear(FEATURES, 64, bias=False), nn.BatchNorm1d(64, **batch_norm), nn.ReLU(), before,
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64, **batch_norm), nn.ReLU(), after, nn.Linear(64, CLASSES),
    )  # fmt: skip


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], epochs: int = 1, lr: float = 0.05) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module, batches: Batches) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def report(title: str, code: str, model: nn.Module, batches: Batches, **given: object) -> bool:
    """Prints the accuracy and what the doctor says of `code`; returns whether it found it."""
    diagnosis = diagnose(model, batches, **given)
    found = [finding for finding in diagnosis.findings if finding.code == code]
    print(f"{title}: evaluation accuracy {accuracy(model, batches):.1%}")
    for finding in found:
        print(f"  {finding}")
    if not found:
        print(f"  no {code}")
    return bool(found)


def watched(train_it: Callable[[], nn.Module], model: nn.Module) -> str:
    """Trains under a monitor and returns its table."""
    with Monitor(model) as monitor:
        train_it()
    return monitor.table()
