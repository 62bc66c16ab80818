"""One network through the model tools: given batch normalization, trained, recalibrated, ranked, folded, exported.

python examples/model_tools.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import batchnorm


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    batches = list(zip(images[:1500].split(60), labels[:1500].split(60), strict=True))
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip

    batchnorm.insert(network, images[:1])  # after every hidden layer; found by running one image
    optimizer = torch.optim.SGD(batchnorm.param_groups(network, weight_decay=1e-3), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()

    print("After one epoch the running statistics lag behind the weights:")
    print(batchnorm.recalibrate(network, batches, samples=1000))

    test, wanted = images[1500:], labels[1500:]
    network.eval()
    print(f"test accuracy: {(network(test).argmax(1) == wanted).float().mean():.3f}")
    print(f"least important channels: {batchnorm.importance(network).least(0.05)}")

    folded, report = batchnorm.fold(network, (test,))
    print(report)
    program = torch.export.export(folded, (test,))
    same = (program.module()(test) - network(test)).abs().max()
    print(f"exported without batch normalization; outputs differ by {same:.1e}")


if __name__ == "__main__":
    main()
