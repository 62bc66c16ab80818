"""Fine-tuning on tiny batches: `.eval()` on the layers does not survive `.train()` on the model; `frozen` does.

A network is trained on handwritten digits (scikit-learn). Its convolutions are then fixed and a new head is trained
on digits with inverted contrast, in batches of 4. The statistics that the features were learned with either drift
with the new data or stay, and with them what the first head makes of the same features.

    python examples/fine_tune_frozen.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from batchnorm import BatchNorm2d, BatchNormAct2d


def pretrained(x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), BatchNormAct2d(16, "relu"), nn.Conv2d(16, 16, 3),
        BatchNormAct2d(16, "relu"), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _epoch in range(4):
        for index in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            optimizer.step()
    return net


def fine_tuned(net: nn.Sequential, way: str, x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    norms = [module for module in net.modules() if isinstance(module, BatchNorm2d)]
    for parameter in net[:-1].parameters():
        parameter.requires_grad_(False)
    for norm in norms:
        if way == ".eval()":
            norm.eval()
        norm.frozen = way == "frozen"
    optimizer = torch.optim.SGD(net[-1].parameters(), 0.005)
    for index in torch.randperm(len(x)).split(4):
        net.train()  # every training loop has this line: it undoes .eval() on the layers
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    return net.eval()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target)
    net = pretrained(x[:1200], y[:1200])
    for way in (".eval()", "frozen"):
        torch.manual_seed(1)
        tuned = fine_tuned(copy.deepcopy(net), way, 1 - x[:400], y[:400])
        with torch.no_grad():
            accuracy = (net[-1](tuned[:-1](x[1200:])).argmax(1) == y[1200:]).float().mean().item()
        moved = (tuned[1].norm.running_mean - net[1].norm.running_mean).abs() / net[1].norm.running_var.sqrt()
        print(
            f"{way:>7}: the statistics moved by {moved.max():.2f} standard deviations; "
            f"the first head's accuracy {accuracy:.1%}"
        )


if __name__ == "__main__":
    main()
