"""Your own training loop, judged: does batch normalization help this network, with an error rate?

    python examples/study/own_loop.py

Trains a small network on scikit-learn's digits with and without batch normalization, four seeds each, records every
run and has the table analyzed. Prints the claims and where the report lies.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import batchnorm

STEPS, EVALUATE_EVERY, BATCH = 150, 5, 60


def network(arm: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width in (64, 50):
        norm = [batchnorm.BatchNorm1d(50)] if arm == "batch" else []
        layers += [nn.Linear(width, 50), *norm, nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(50, 10))


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean()
    model.train()
    return float(right)


def main(folder: Path):
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, val, test = order[:1000], order[1000:1400], order[1400:]
    for arm in ("none", "batch"):
        for seed in range(4):
            model = network(arm, seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
            with batchnorm.StudyRecorder(folder / "runs.csv", arm=arm, seed=seed, lr=0.2) as recorder:
                recorder.log(0, accuracy(model, x[val], y[val]))
                for step in range(1, STEPS + 1):
                    batch = train[torch.randint(len(train), (BATCH,))]
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[batch]), y[batch]).backward()
                    optimizer.step()
                    if step % EVALUATE_EVERY == 0:
                        recorder.log(step, accuracy(model, x[val], y[val]))
                        recorder.log(step, accuracy(model, x[test], y[test]), split="test")
    return batchnorm.analyze(folder / "runs.csv", folder / "analysis", metric="accuracy")


if __name__ == "__main__":
    result = main(Path(sys.argv[1] if len(sys.argv) > 1 else "own-loop"))
    for name, claim in result.claims.items():
        print(f"{name}: {claim.verdict} ({claim.reason or claim.text})")
    print(result.report)
