"""What the readers accept, how samples are split, and that nothing of the held-out parts leaks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchnorm.errors import UserError
from batchnorm.experiment.data.opening import find, load
from batchnorm.experiment.data.splits import PARTS, split, standardize


def test_digits_keep_their_image_shape() -> None:
    data = load("digits")
    assert data.shape == (1, 8, 8)
    assert data.labels == [str(k) for k in range(10)]
    assert sum(len(data.y[part]) for part in PARTS) == 1797


@given(
    counts=st.lists(st.integers(3, 60), min_size=2, max_size=6),
    seed=st.integers(0, 5),
)
def test_split_is_a_stratified_partition(counts: list[int], seed: int) -> None:
    y = np.repeat(np.arange(len(counts)), counts)
    parts = split(y, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(y)))
    for k, count in enumerate(counts):
        held = {part: int((y[parts[part]] == k).sum()) for part in PARTS}
        assert min(held.values()) >= 1
        assert abs(held["validation"] - 0.2 * count) <= 1
        assert abs(held["test"] - 0.2 * count) <= 1


def test_split_depends_on_the_seed_alone() -> None:
    y = np.repeat(np.arange(4), 25)
    assert all(np.array_equal(split(y, 1)[p], split(y, 1)[p]) for p in PARTS)
    assert not np.array_equal(split(y, 1)["test"], split(y, 2)["test"])


def test_held_out_parts_take_no_part_in_the_standardization() -> None:
    generator = np.random.default_rng(0)
    x = {part: generator.normal(5, 2, (50, 3)) for part in PARTS}
    before = standardize(x, "x")
    np.testing.assert_allclose(before["train"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(before["train"].std(0), 1, atol=1e-6)
    moved = {**x, "test": x["test"] * 1e6, "validation": x["validation"] - 1e3}
    after = standardize(moved, "x")
    np.testing.assert_array_equal(after["train"], before["train"])
    mean, sd = x["train"].mean(0), x["train"].std(0)
    np.testing.assert_allclose(after["test"], (moved["test"] - mean) / sd, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e9 / 3])
def test_a_constant_feature_is_centered_and_not_blown_up(value: float) -> None:
    x = {part: np.full((30, 2), value) for part in PARTS}
    x["test"][0] = value + 2
    out = standardize(x, "x")
    assert np.abs(out["train"]).max() <= 1e-6 * max(1, value)
    assert out["test"][0, 0] == pytest.approx(2, rel=1e-6)


def test_images_are_standardized_per_channel() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 2, 5, 5)) * np.array([1, 50]).reshape(1, 2, 1, 1)
    out = standardize(dict.fromkeys(PARTS, x), "x")["train"]
    np.testing.assert_allclose(out.std(axis=(0, 2, 3)), 1, rtol=1e-5)


def test_csv_takes_the_column_label_wherever_it_stands(tmp_path: Path) -> None:
    table = pd.DataFrame({"label": ["a", "b"] * 3, "u": range(6), "v": [True, False] * 3})
    table.to_csv(tmp_path / "t.csv", index=False)
    samples = find(str(tmp_path / "t.csv"))
    assert samples.x.tolist() == [[k, 1 - k % 2] for k in range(6)]
    assert samples.y.tolist() == ["a", "b"] * 3


def test_csv_without_a_column_label_takes_the_last(tmp_path: Path) -> None:
    pd.DataFrame({"u": range(6), "v": range(6), "kind": [1.0, 2.0] * 3}).to_csv(tmp_path / "t.csv", index=False)
    samples = find(str(tmp_path / "t.csv"))
    assert samples.x.shape == (6, 2)
    assert samples.y.tolist() == ["1", "2"] * 3


def test_numeric_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.arange(36.0).reshape(-1, 2), y=np.repeat([10, 2, 1], 6))
    assert load(str(tmp_path / "t.npz")).labels == ["1", "2", "10"]


def test_npz_keeps_the_samples_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.random.default_rng(0).integers(0, 255, (12, 3, 4, 5), np.uint8), y=list("ab") * 6)
    data = load(str(tmp_path / "t.npz"))
    assert data.shape == (3, 4, 5)
    assert data.x["train"].dtype == np.float32
    assert data.labels == ["a", "b"]


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16"])
def test_images_come_out_at_one_size(tmp_path: Path, mode: str) -> None:
    generator = np.random.default_rng(0)
    for label in ("cat", "dog <b>"):
        (tmp_path / label).mkdir()
        for k in range(4):
            shape = (10 + k, 12) if mode != "RGB" else (10 + k, 12, 3)
            gray = generator.integers(0, 255, shape, np.uint8)
            if mode == "I;16":
                image = Image.fromarray(gray.astype(np.uint16) * 257)
            else:
                image = Image.fromarray(gray).convert(mode)
            image.save(tmp_path / label / f"{k}.png")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    samples = find(str(tmp_path))
    assert samples.x.shape == (8, 1 if mode in ("L", "I;16") else 3, 11, 12)
    assert 0 <= samples.x.min() < samples.x.max() <= 1
    assert load(str(tmp_path)).labels == ["cat", "dog <b>"]


def test_large_images_are_brought_down(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for k in range(3):
            Image.new("L", (200, 100), 80 * k).save(tmp_path / label / f"{k}.png")
    assert find(str(tmp_path)).x.shape == (6, 1, 64, 64)


def test_openml_frames_are_read_like_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bunch:
        data = pd.DataFrame({"u": [1, 2, 3] * 4})
        target = pd.Series(["x", "y"] * 6, dtype="category", name="class")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda **_: Bunch)
    samples = find("openml:iris")
    assert samples.x[:3, 0].tolist() == [1, 2, 3]
    assert samples.y[:2].tolist() == ["x", "y"]


def test_openml_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", offline)
    with pytest.raises(UserError, match=r"no network.*openml:iris.*local file"):
        find("openml:iris")


def test_an_npz_with_a_pickle_never_runs_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (ran,)

    np.savez(tmp_path / "t.npz", x=np.array([Bomb()], dtype=object), y=np.zeros(1))
    with pytest.raises(UserError, match="object arrays"):
        find(str(tmp_path / "t.npz"))
    assert not ran.exists()
