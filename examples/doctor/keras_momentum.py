"""A momentum copied from Keras: the running statistics are those of the last batch.

python examples/doctor/keras_momentum.py
"""

from __future__ import annotations

from broken import data, network, report, train


def main() -> tuple[bool, bool]:
    training, test = data(60), data(20, seed=1)
    # The last batch of an epoch is a leftover of four, and with 0.99 it alone decides.
    training.append(tuple(part[:4] for part in data(1, seed=2)[0]))
    model = train(network(momentum=0.99), training)
    before = report("momentum=0.99", "BN102", model, test)

    model = train(network(momentum=0.1), training, epochs=2)
    after = report("momentum=0.1", "BN102", model, test)
    return before, after


if __name__ == "__main__":
    main()
