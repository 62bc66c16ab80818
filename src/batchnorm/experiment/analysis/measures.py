"""What one seed's runs show: the numbers that the claims compare between arms. Plain arrays in, plain numbers out."""

import numpy as np
from numpy.typing import ArrayLike

TOLERANCE = 0.02  # two points: the accuracy that a tolerated rate may lose


def decades_within(lrs: ArrayLike, accuracies: ArrayLike, chance: float = 0.0) -> float:
    """Return the decades of learning rate at which the accuracy is within two points of the largest one of the grid.

    The accuracy is interpolated linearly over log10(lr). All intervals above the threshold count, so that one unlucky
    run in the middle costs its own surroundings and nothing beyond them.

    Args:
        lrs: ascending positive rates.
        accuracies: fractions, one a rate.
        chance: the accuracy of guessing; a network whose best is not two points over it tolerates no rate.
    """
    x, y = np.log10(np.asarray(lrs, dtype=np.float64)), np.asarray(accuracies, dtype=np.float64)
    if y.max() < chance + TOLERANCE:
        return 0.0
    # On a small validation set the margin can be met exactly; rounding must not turn that into a miss.
    over = y - (y.max() - TOLERANCE) + 1e-9
    left, right = over[:-1], over[1:]
    both, either = (left >= 0) & (right >= 0), (left >= 0) | (right >= 0)
    share = np.where(both, 1.0, 0.0)
    mixed = either & ~both
    share[mixed] = np.maximum(left, right)[mixed] / np.abs(right - left)[mixed]
    return float(np.sum(share * np.diff(x)))


def reaches_grid_end(accuracies: ArrayLike) -> bool:
    """Return whether the tolerated rates run into an end of the grid, so that their width is cut off there."""
    y = np.asarray(accuracies, dtype=np.float64)
    return bool(max(y[0], y[-1]) >= y.max() - TOLERANCE - 1e-9)
