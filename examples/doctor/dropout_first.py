"""Dropout before batch normalization: the statistics are learned with it, and used without it.

python examples/doctor/dropout_first.py
"""

from __future__ import annotations

from broken import data, network, report, train


def main() -> tuple[bool, bool]:
    training, test = data(60), data(20, seed=1)
    before = report("dropout first", "BN105", train(network(dropout_first=True), training, epochs=3), test)
    after = report("dropout last", "BN105", train(network(), training, epochs=3), test)
    return before, after


if __name__ == "__main__":
    main()
