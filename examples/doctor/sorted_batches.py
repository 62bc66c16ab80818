"""Batches sorted by class: in training the batch's own mean tells the class; evaluation has no such help.

python examples/doctor/sorted_batches.py
"""

from __future__ import annotations

import torch
from broken import data, network, report, train, watched


def main() -> tuple[bool, bool]:
    test = data(20, seed=1)
    x, y = (torch.cat(parts) for parts in zip(*data(60), strict=True))
    order = y.argsort(stable=True)
    in_order = list(zip(x[order].split(64), y[order].split(64), strict=True))

    model = network()
    print(watched(lambda: train(model, in_order), model))
    before = report("sorted, on its own batches", "BN206", model.train(), in_order)
    report("sorted, on test data", "BN206", model, test)

    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    mixed = list(zip(x[shuffled].split(64), y[shuffled].split(64), strict=True))
    model = train(network(), mixed)
    after = report("shuffled", "BN206", model.train(), mixed)
    report("shuffled, on test data", "BN206", model, test)
    return before, after


if __name__ == "__main__":
    main()
