"""Small inputs for the study: a few dozen samples, so that a whole study takes about a second."""

from pathlib import Path

import numpy as np
import pytest

SMALL = ("--quick", "--lrs", "0.1,1", "--steps", "8", "--workers", "1")


def write_small_npz(path: Path) -> Path:
    """Writes three well separated classes of 20 samples of 4 features."""
    generator = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 20)
    x = generator.normal(size=(60, 4)) + 3 * np.eye(4)[y]
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture
def small_npz(tmp_path: Path) -> Path:
    return write_small_npz(tmp_path / "small.npz")
