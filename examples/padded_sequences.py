"""Padding contaminates batch statistics; a mask leaves it out.

Handwritten digits (scikit-learn) are read as sequences of 8 rows, cut to random lengths, and padded to another
length in each batch, as sequences are. The same small 1-D network is trained with and without the mask.

    python examples/padded_sequences.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from batchnorm import BatchNorm1d, BatchNormAct1d, lengths_to_mask


class Net(nn.Module):
    """Two convolutions over time, batch normalization after each, the mean over the real positions, a classifier."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.convs = nn.ModuleList([nn.Conv1d(8, 32, 3, padding=1), nn.Conv1d(32, 32, 3, padding=1)])
        self.norms = nn.ModuleList([BatchNormAct1d(32, "relu") for _ in self.convs])
        self.classify = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = lengths_to_mask(lengths, x.size(-1))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x * mask.unsqueeze(1)), mask=mask if self.masked else None)
        total = (x * mask.unsqueeze(1)).sum(-1)
        return self.classify(total / lengths.unsqueeze(1))


def contamination(net: Net) -> float:
    """How far four times the padding moves the mean of the same sequences: standard deviations, worst channel."""
    norm = net.norms[0].norm
    x, lengths = torch.randn(256, 8, 8) + 1, torch.randint(4, 9, (256,))
    moved = []
    for padded in (8, 32):
        layer = BatchNorm1d(32, momentum=1.0)
        mask = lengths_to_mask(lengths, padded)
        values = net.convs[0](F.pad(x, (0, padded - 8)) * mask.unsqueeze(1))
        layer(values, mask=mask if net.masked else None)
        moved.append(layer.running_mean)
    return ((moved[1] - moved[0]).abs() / norm.running_var.sqrt()).max().item()


def run(masked: bool) -> tuple[float, float]:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images / 16.0, dtype=torch.float32)
    x = (x - x.mean()) / x.std() + 1  # real data is not centered at the padding's value
    y = torch.tensor(digits.target)
    lengths = torch.randint(4, 9, (len(x),))
    net = Net(masked)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _epoch in range(6):
        for index in torch.randperm(1200).split(60):
            # each batch is padded to another length, as batches of sequences are
            padded = F.pad(x[index], (0, int(torch.randint(0, 25, ()))))
            loss = F.cross_entropy(net(padded, lengths[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(x[1200:], lengths[1200:]).argmax(1) == y[1200:]).float().mean().item()
        return accuracy, contamination(net)


def main() -> None:
    torch.set_num_threads(1)
    for masked in (False, True):
        accuracy, moved = run(masked)
        print(
            f"{'with the mask' if masked else 'without':>13}: test accuracy {accuracy:.1%}; "
            f"four times the padding moves the statistics by {moved:.2f} standard deviations"
        )


if __name__ == "__main__":
    main()
