"""Labels in order, the training, validation and test parts, and the numbers that standardize them.

The split is fixed by the study's base seed, so every arm and every seed sees the same samples in the same parts.
"""

from __future__ import annotations

import numpy as np

from ...errors import UserError

PARTS = ("train", "validation", "test")
HELD_OUT = PARTS[1:]
# 60/20/20, but at most these many samples are held out: each run evaluates about forty times, and at 2,000 samples the
# standard error of an accuracy near 95 % is already under half a point.
VALIDATION_SHARE, VALIDATION_MOST = 0.2, 2_000
TEST_SHARE, TEST_MOST = 0.2, 10_000
TRAIN, VALIDATION, TEST = range(3)


def order_labels(values: list[str], counts: np.ndarray, name: str) -> tuple[list[str], np.ndarray]:
    """Return the labels in order and, for each of `values` (which are sorted as text), its number.

    Raises:
        UserError: labels that no network can be trained and tested on: none, a single one, one with few samples.
    """
    if not values:
        raise UserError(f"no samples, {name}, give a data set with at least 3 samples of each class")
    if len(values) < 2:
        raise UserError(f"a single class {values[0]!r}, {name}, give data with at least two different labels")
    if counts.min() < 3:
        raise UserError(
            f"class {values[counts.argmin()]!r} has {counts.min()} sample(s), {name}, "
            "give each class at least 3 (one each for training, validation and test) or leave it out"
        )
    try:  # 2 before 10 when every label is a number
        order = np.argsort([float(value) for value in values], kind="stable")
    except ValueError:
        order = np.arange(len(values))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return [values[k] for k in order], rank.astype(np.int64)


def held_out_shares(rows: int, most: float = np.inf) -> tuple[float, float]:
    """Return the shares of the validation and the test part, neither of them more than `most` samples."""
    return (
        min(VALIDATION_SHARE, min(VALIDATION_MOST, most) / rows),
        min(TEST_SHARE, min(TEST_MOST, most) / rows),
    )


def split(y: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return the sample numbers of each part, every class in every part in (nearly) the same share.

    Args:
        y: class numbers (n,), each class at least three times.
        seed: decides which samples go where.
    """
    generator = np.random.default_rng(seed)
    validation, test = held_out_shares(len(y))
    picked: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for k in range(int(y.max()) + 1):
        members = generator.permutation(np.flatnonzero(y == k))
        n_validation = max(1, round(validation * len(members)))
        n_test = max(1, round(test * len(members)))
        picked["validation"].append(members[:n_validation])
        picked["test"].append(members[n_validation : n_validation + n_test])
        picked["train"].append(members[n_validation + n_test :])
    return {part: generator.permutation(np.concatenate(members)) for part, members in picked.items()}


def standardize(x: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Return every part as float32 (x − mean)/sd, mean and sd those of the training part.

    One mean and sd a feature for flat samples, one a channel for (C, H, W) and deeper, one in all for (H, W):
    single pixels at an image's rim hardly vary, and dividing by their own sd would turn noise into outliers.
    What does not vary in the training part is only centered.

    Raises:
        UserError: values too large for their variance to be represented.
    """
    train = x["train"]
    axes = {2: (0,), 3: (0, 1, 2)}.get(train.ndim, (0, *range(2, train.ndim)))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = train.mean(axis=axes, dtype=np.float64, keepdims=True)
        sd = np.sqrt(np.mean(np.square(train - mean), axis=axes, dtype=np.float64, keepdims=True))
    sd = usable_spread(mean, sd, name)
    return {part: ((values - mean) / sd).astype(np.float32) for part, values in x.items()}


def usable_spread(mean: np.ndarray, sd: np.ndarray, name: str) -> np.ndarray:
    """Return the divisor for standardizing: `sd`, but 1 for what does not vary.

    Raises:
        UserError: values too large for their variance to be represented.
    """
    if not (np.isfinite(mean).all() and np.isfinite(sd).all()):
        raise UserError(f"values too large to standardize, {name}, scale the features down")
    # The sd of a constant feature is rounding error: a few ulps of its mean.
    sd = np.where(sd <= 1e-12 * np.abs(mean), 1.0, sd)
    return np.where(sd == 0, 1.0, sd)


def parts_of(index: np.ndarray, seed: int, validation: float, test: float) -> np.ndarray:
    """Return the part of each row (TRAIN, VALIDATION or TEST), by its number and the seed alone.

    A row's hash is a number u, uniform in [0, 1): test where u < `test`, validation where u < `test` + `validation`.
    """
    from pandas.util import hash_array

    # pandas hashes an integer as splitmix64 does (Steele, Lea & Flood 2014) with the integer as its state.
    state = index + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    u = (hash_array(state) >> np.uint64(11)) * 2.0**-53
    return np.where(u < test, TEST, np.where(u < test + validation, VALIDATION, TRAIN))
