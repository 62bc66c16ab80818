"""Fine-tuning with γ and β held, but not the statistics: new data move them under the frozen weights.

python examples/doctor/half_frozen.py
"""

from __future__ import annotations

from broken import accuracy, data, network, report, train

from batchnorm.model_tools import freeze


def main() -> tuple[bool, bool]:
    training, test = data(60), data(20, seed=1)
    other = [(3 * x - 5, y) for x, y in data(20, seed=2)]  # the new task's data are on another scale

    model = train(network(), training, epochs=3)
    for layer in (0, 1, 4, 5):
        model[layer].requires_grad_(False)
    before = report("before fine-tuning", "BN103", model.train(), test)
    with_moving = accuracy(_pass_over(model, other), test)

    model = freeze(train(network(), training, epochs=3))
    after = report("frozen", "BN103", model.train(), test)
    held = accuracy(_pass_over(model, other), test)
    print(f"the old task after the new data: moving {with_moving:.1%}, held {held:.1%}")
    return before, after


def _pass_over(model, batches):
    """Forwards in training mode, as fine-tuning the head does."""
    model.train()
    for x, _ in batches:
        model(x)
    return model


if __name__ == "__main__":
    main()
