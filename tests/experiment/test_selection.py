"""Rows by what their columns hold, as the claims, the factors and the report ask for them."""

import math

import numpy as np
import pandas as pd

from batchnorm.experiment.design.selection import rows_at

RUNS = pd.DataFrame(
    {
        "arm": ["none", "batch", "batch", "batch"],
        "lr": [0.1, 0.1, 0.1 * (1 + 1e-7), 0.1 * (1 + 1e-4)],
        "weight_decay": [0.0, 0.0, 1e-12, 0.0],
        "batch_size": [2_000_000, 2_000_000, 2_000_001, 60],
    }
)


def test_floats_fit_to_a_millionth_and_all_else_exactly() -> None:
    assert rows_at(RUNS, lr=0.1).index.tolist() == [0, 1, 2]
    assert rows_at(RUNS, lr=np.float64(0.1), arm="batch").index.tolist() == [1, 2]
    assert rows_at(RUNS, weight_decay=0.0).index.tolist() == [0, 1, 3]
    assert rows_at(RUNS, batch_size=2_000_000).index.tolist() == [0, 1]


def test_a_setting_that_is_missing_fits_nothing() -> None:
    assert rows_at(RUNS, lr=None).empty
    assert rows_at(RUNS, lr=math.nan).empty
    assert len(rows_at(RUNS)) == len(RUNS)
