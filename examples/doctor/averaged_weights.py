"""An exponential moving average of the parameters alone: the copy's buffers are those of a new network.

python examples/doctor/averaged_weights.py
"""

from __future__ import annotations

import copy

import torch
from broken import data, network, report, train

from batchnorm.model_tools import recalibrate


def main() -> tuple[bool, bool]:
    training, test = data(60), data(20, seed=1)
    model = network()
    average = copy.deepcopy(model)
    for batch in training:
        train(model, [batch])
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)
    before = report("averaged parameters, new buffers", "BN106", average.eval(), test)

    recalibrate(average, training)
    after = report("recalibrated", "BN106", average.eval(), test)
    return before, after


if __name__ == "__main__":
    main()
