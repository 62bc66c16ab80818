"""What one seed's runs show: the numbers that the claims compare between arms. Plain arrays in, plain numbers out."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
TOLERANCE = 0.02  # two points: the accuracy that a tolerated rate may lose


def drift_of_run(values: ArrayLike) -> float:
    """How far a typical hidden unit's percentiles wander during a run, in units of the unit's spread.

        drift = median over units u of  √( mean over t and levels p of (v[t,u,p] − v̄[u,p])² ) / S[u]
        v̄[u,p] = mean over t of v[t,u,p],   S[u] = mean over t of v[t,u,last] − v[t,u,first]

    Zero for a unit that stays where it is, unchanged when a unit's values are shifted or scaled.

    Args:
        values: shape (T, U, 3): the 15th, 50th and 85th percentile of U units' pre-activations at T evaluations.

    Returns:
        The drift; NaN where it has none: fewer than two evaluations with finite values, or no unit with a spread.

    Raises:
        ValueError: another shape.

    Source: the quantity drawn in Figure 1(b, c) of Ioffe & Szegedy (2015); the number is this library's own.
    """
    path = np.asarray(values, dtype=np.float64)
    if path.ndim != 3 or path.shape[2] < 2:
        raise ValueError(f"percentiles have shape (evaluations, units, levels), not {path.shape}")
    path = path[np.isfinite(path).all(axis=(1, 2))]
    if len(path) < 2:
        return float("nan")
    # Scaled first: squares of a diverging run's values would overflow.
    scale = np.abs(path).max(axis=(0, 2))
    path = path[:, scale > 0] / scale[scale > 0, None]
    spread = (path[:, :, -1] - path[:, :, 0]).mean(axis=0)
    wander = path.std(axis=0)
    alive = spread > 1e-12
    if not alive.any():
        return float("nan")
    return float(np.median(np.sqrt((wander[alive] ** 2).mean(axis=1)) / spread[alive]))


def decades_within(lrs: ArrayLike, accuracies: ArrayLike, chance: float = 0.0) -> float:
    """Decades of learning rate at which the accuracy is within two points of the largest one of the grid.

    The accuracy is drawn straight between neighbors over log10(lr); all stretches over the threshold count,
    so that one unlucky run in the middle costs its own surroundings and not all that lies behind it.

    Args:
        lrs: ascending positive rates.
        accuracies: fractions, one a rate.
        chance: the accuracy of guessing; a network whose best is not two points over it tolerates no rate.
    """
    x, y = np.log10(np.asarray(lrs, dtype=np.float64)), np.asarray(accuracies, dtype=np.float64)
    if y.max() < chance + TOLERANCE:
        return 0.0
    # The margin is a lattice distance on a small validation set: an exact two points must count as two points.
    over = y - (y.max() - TOLERANCE) + 1e-9
    left, right = over[:-1], over[1:]
    both, either = (left >= 0) & (right >= 0), (left >= 0) | (right >= 0)
    share = np.where(both, 1.0, 0.0)
    mixed = either & ~both
    share[mixed] = np.maximum(left, right)[mixed] / np.abs(right - left)[mixed]
    return float(np.sum(share * np.diff(x)))


def reaches_grid_end(accuracies: ArrayLike) -> bool:
    """Whether the tolerated rates run into an end of the grid, so that their width is cut off there."""
    y = np.asarray(accuracies, dtype=np.float64)
    return bool(max(y[0], y[-1]) >= y.max() - TOLERANCE - 1e-9)
