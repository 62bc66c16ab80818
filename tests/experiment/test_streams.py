"""Streamed data: the same samples as in memory, each once a pass, in a random order that repeats; in bounded memory."""

import io
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batchnorm.doctor.subject import read_data
from batchnorm.experiment.data import shuffle as order
from batchnorm.experiment.data import sources as source
from batchnorm.experiment.data import survey
from batchnorm.experiment.data.dataset import Dataset, ResidentDataset
from batchnorm.experiment.data.opening import load, open_source
from batchnorm.experiment.data.shuffle import drawn
from batchnorm.experiment.data.splits import HELD_OUT, PARTS, TEST, TRAIN, VALIDATION, parts_of
from batchnorm.experiment.data.streamed import StreamedDataset
from batchnorm.experiment.design.plan import make_plan
from batchnorm.experiment.engines.local import execute, fresh_workers, open_shared, shared_data
from batchnorm.experiment.output.study_folder import Record
from batchnorm.experiment.training.networks import Architecture
from tests.experiment import stream_sets
from tests.experiment.stream_sets import FORMS, ROWS, X, Y, stored


@pytest.fixture
def _all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size, what can be streamed is."""
    monkeypatch.setattr(source, "WHOLE_BYTES", 0)
    monkeypatch.setattr(source, "SEGMENT_BYTES", 20 * X[0].nbytes)


def streamed(form: str, folder: Path) -> StreamedDataset:
    data = load(stored(form, folder))
    assert isinstance(data, StreamedDataset)
    return data


def an_epoch(data: Dataset, batch_size: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the first pass draws, as stored (x) and as numbered (y)."""
    batches = data.batches(batch_size, seed)
    pairs = [next(batches) for _ in range(data.size("train") // batch_size)]
    assert {len(y) for _, y in pairs} == {batch_size}
    assert isinstance(data, StreamedDataset)
    x = np.concatenate([x.numpy() for x, _ in pairs])
    return x * np.asarray(data.facts.sd) + np.asarray(data.facts.mean), np.concatenate([y.numpy() for _, y in pairs])


@pytest.mark.usefixtures("_all_large")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_every_sample_once_a_pass(form: str, tmp_path: Path) -> None:
    data = streamed(form, tmp_path)
    x, y = an_epoch(data, 7)
    drawn_rows = x[:, 0].round().astype(int)
    held = {part: data.x[part] * np.asarray(data.facts.sd) + np.asarray(data.facts.mean) for part in HELD_OUT}
    held_rows = np.concatenate([values[:, 0] for values in held.values()]).round().astype(int)
    assert len(set(drawn_rows)) == len(drawn_rows) == data.size("train") // 7 * 7
    assert len(set(held_rows)) == len(held_rows) == ROWS - data.size("train")
    assert not set(drawn_rows) & set(held_rows)
    held_x, held_y = np.concatenate(list(held.values())), np.concatenate([data.y[part] for part in HELD_OUT])
    for rows, values, labels in ((drawn_rows, x, y), (held_rows, held_x, held_y)):
        np.testing.assert_allclose(values, X[rows], rtol=1e-6, atol=1e-4)
        np.testing.assert_array_equal(labels, Y[rows])
    assert [label.removeprefix("class ") for label in data.labels] == ["0", "1", "2"]


@pytest.mark.usefixtures("_all_large")
@pytest.mark.parametrize("form", ["npy_shards", "parquet_shards", "iterable"])
def test_moments_are_the_training_rows_exactly(form: str, tmp_path: Path) -> None:
    data = streamed(form, tmp_path)
    held = np.isin(np.arange(ROWS), data.held_rows)
    train = X[~held].astype(np.longdouble)
    np.testing.assert_allclose(np.asarray(data.facts.mean)[0], train.mean(0).astype(float), rtol=1e-14)
    np.testing.assert_allclose(np.asarray(data.facts.sd)[0], train.std(0).astype(float), rtol=1e-12)


@pytest.mark.usefixtures("_all_large")
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4)])
def test_moments_of_images_are_one_in_all_or_one_a_channel(shape: tuple[int, ...], tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 255, (300, *shape), np.uint8)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(300) % 2)
    data = load(str(tmp_path / "x.npy"))
    assert isinstance(data, StreamedDataset)
    train = np.delete(x, data.held_rows, 0).astype(float)
    axes = (0, 1, 2) if len(shape) == 2 else (0, 2, 3)
    np.testing.assert_allclose(np.asarray(data.facts.mean), train.mean(axes, keepdims=True), rtol=1e-13)
    np.testing.assert_allclose(np.asarray(data.facts.sd), train.std(axes, keepdims=True), rtol=1e-13)


@pytest.mark.usefixtures("_all_large")
@pytest.mark.parametrize("form", ["npy", "parquet_shards", "numbered", "generator"])
def test_the_order_depends_on_seed_and_pass_alone(form: str, tmp_path: Path) -> None:
    data = streamed(form, tmp_path)
    with shared_data(data) as folder:
        again = open_shared(folder)
    assert isinstance(again, StreamedDataset)
    for part in HELD_OUT:
        np.testing.assert_array_equal(again.x[part], data.x[part])
        np.testing.assert_array_equal(again.y[part], data.y[part])
    mine, theirs, other = data.batches(50, 3), again.batches(50, 3), data.batches(50, 4)
    passes = [np.concatenate([next(mine)[0].numpy() for _ in range(data.size("train") // 50)]) for _ in range(2)]
    same = np.concatenate([next(theirs)[0].numpy() for _ in range(data.size("train") // 50)])
    np.testing.assert_array_equal(passes[0], same)
    assert not np.array_equal(passes[0], passes[1])
    assert not np.array_equal(passes[0][:50], next(other)[0].numpy())


@pytest.mark.parametrize("form", FORMS)
def test_small_sets_are_held_and_split_as_ever(form: str, tmp_path: Path) -> None:
    data = load(stored(form, tmp_path))
    assert type(data) is ResidentDataset
    (tmp_path / "reference").mkdir()
    np.savez(tmp_path / "reference" / "a.npz", x=X, y=Y)
    wanted = load(str(tmp_path / "reference" / "a.npz"))
    if form == "parquet_folders":  # the rows come by class: another order, the same samples
        for arrays in (data.x, wanted.x):
            every = np.concatenate([arrays[part] for part in PARTS])
            assert every.shape == (ROWS, 4)
        return
    assert data.fingerprint() == wanted.fingerprint()


def test_the_split_is_by_the_rows_number_and_the_seed() -> None:
    rows = np.arange(200_000, dtype=np.uint64)
    parts = parts_of(rows, 0, 0.2, 0.1)
    np.testing.assert_array_equal(parts_of(rows[777:900], 0, 0.2, 0.1), parts[777:900])
    for part, share in ((TRAIN, 0.7), (VALIDATION, 0.2), (TEST, 0.1)):
        assert (parts == part).mean() == pytest.approx(share, abs=0.005)  # five standard errors
    assert (parts != parts_of(rows, 1, 0.2, 0.1)).mean() == pytest.approx(1 - 0.7**2 - 0.2**2 - 0.1**2, abs=0.006)
    neighbors = np.corrcoef(parts[:-1] == TEST, parts[1:] == TEST)[0, 1]
    assert abs(neighbors) < 0.012


@given(
    blocks=st.lists(st.integers(0, 9), max_size=12),
    size=st.integers(1, 6),
    room=st.integers(0, 20),
)
def test_a_buffer_loses_nothing_and_repeats_nothing(blocks: list[int], size: int, room: int) -> None:
    ends = np.cumsum(blocks, dtype=int)
    spans = [np.arange(end - count, end) for count, end in zip(blocks, ends, strict=True)]
    rows = [(span[:, None], span) for span in spans]
    batches = list(drawn(rows, size, size + room, np.random.default_rng(0)))
    y = [int(k) for _, batch in batches for k in batch]
    assert all(len(batch) == size and np.array_equal(x[:, 0], batch) for x, batch in batches)
    assert len(set(y)) == len(y) == sum(blocks) // size * size
    # A row is drawn at the earliest when the buffer was full with it, so never far ahead of the rows read.
    assert all(k < size + room + size * (number // size + 1) for number, k in enumerate(y))


def test_a_buffer_mixes() -> None:
    rows = [(np.empty((100, 0)), np.arange(100 * k, 100 * (k + 1))) for k in range(100)]
    y = np.concatenate([y for _, y in drawn(rows, 50, 2_500, np.random.default_rng(0))])
    # Rows wait about as long as it takes to read a bufferful: an exponential law with that mean, end effects aside.
    waits = np.abs(np.arange(10_000) + 2_500 - y)[:5_000]
    assert waits.mean() == pytest.approx(2_500, rel=0.25)
    assert np.unique(y[:1_000] // 100).size > 20


def sorted_parquet(path: Path, row_group: int) -> str:
    x = np.random.default_rng(0).normal(size=(20_000, 2)) + np.arange(20_000)[:, None] // 2_000
    sorted_rows = pa.table({"a": x[:, 0], "b": x[:, 1], "label": np.arange(20_000) // 2_000})
    pq.write_table(sorted_rows, path, row_group_size=row_group)
    return str(path)


@pytest.mark.usefixtures("_all_large")
def test_an_order_that_is_not_random_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BUFFER_BYTES", 2_000 * 16)
    path = sorted_parquet(tmp_path / "a.parquet", 20_000)
    with pytest.warns(UserWarning, match=r"order of a\.parquet is not random.*BN206") as caught:
        data = load(path)
    assert len(caught) == 1
    found = data.describe()["order"]
    assert found["random"] is False
    assert found["variance_ratio"] > 10
    shown = io.StringIO()
    load(path, progress=shown)
    assert "warning: the order of a.parquet is not random" in shown.getvalue()
    assert "samples/s" in shown.getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed = load(sorted_parquet(tmp_path / "b.parquet", 50))
    assert mixed.describe()["order"]["random"] is True


@pytest.mark.usefixtures("_all_large")
def test_memory_does_not_grow_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "BUFFER_BYTES", 2**19)
    monkeypatch.setattr(survey, "HELD_BYTES", 2**19)
    monkeypatch.setattr(source, "SEGMENT_BYTES", 2**15)
    peaks = []
    for rows in (12_000, 48_000):  # 3 and 12 MB
        np.save(tmp_path / f"{rows}x.npy", np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32))
        np.save(tmp_path / f"{rows}y.npy", np.arange(rows, dtype=np.int16) % 5)
        if not peaks:
            load(str(tmp_path / f"{rows}x.npy"))  # imports and caches
        tracemalloc.start()
        data = load(str(tmp_path / f"{rows}x.npy"))
        batches = data.batches(100, 0)
        for _ in range(data.size("train") // 100 + 1):
            next(batches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 6 * 2**20


@pytest.mark.usefixtures("_all_large")
def test_image_folders_are_decoded_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for label, gray in (("cat", 60), ("dog", 160)):
        (tmp_path / label).mkdir()
        for k in range(30):
            pixels = generator.integers(gray, gray + 60, (9 + k % 3, 12, 3), np.uint8)
            image = Image.fromarray(pixels).rotate(90, expand=True) if k == 5 else Image.fromarray(pixels)
            exif = Image.Exif()
            exif[0x0112] = 6 if k == 5 else 1
            image.save(tmp_path / label / f"{k:02}.png", exif=exif)
    data = load(str(tmp_path))
    assert isinstance(data, StreamedDataset)
    with monkeypatch.context() as patch:
        patch.setattr(source, "WHOLE_BYTES", 2**30)
        whole = open_source(str(tmp_path))
        assert whole is not None
        samples = whole.whole()
    assert data.shape == samples.x.shape[1:] == (3, 10, 12)
    blocks = [block for segment in range(len(data.source.starts) - 1) for block in data.source.read(segment)]
    np.testing.assert_array_equal(np.concatenate([block.x for block in blocks]), samples.x)
    assert [block.labels[k] for block in blocks for k in block.y] == samples.y.tolist()
    assert data.labels == ["cat", "dog"]


@pytest.mark.usefixtures("_all_large")
def test_the_doctor_takes_what_it_needs_of_a_large_set(tmp_path: Path) -> None:
    name = sorted_parquet(tmp_path / "a.parquet", 500)
    batches = list(read_data(name, 50))
    assert [tuple(x.shape) for x, _ in batches] == [(50, 2)] * 201
    rows = torch.cat([x for x, _ in batches])[:, 0]
    assert rows.unique().numel() > 10_000
    assert float(rows.mean()) == pytest.approx(4.5, abs=0.1)  # from all over the sorted rows: 3.5 standard errors
    assert sorted(set(torch.cat([y for _, y in batches]).tolist())) == list(range(10))


@pytest.mark.slow
@pytest.mark.usefixtures("_all_large")
def test_one_worker_and_two_train_the_same(tmp_path: Path) -> None:
    data = load(stored("npy_shards", tmp_path))
    runs = make_plan("mlp", "none,batch", quick=True, lrs="0.1", steps=5).runs_at_base()[-2:]
    found = []
    with shared_data(data) as folder, fresh_workers():
        for workers in (1, 2):
            Record(tmp_path / str(workers)).begin({}, resume=False)
            rows: list[dict[str, Any]] = []
            execute(runs, Architecture("mlp", (4,), 3, 60), folder, tmp_path / str(workers), workers, rows.append)
            found.append({row.pop("run_id"): {**row, "seconds": 0} for row in rows})
    assert found[0] == found[1]
    assert not any(row["diverged"] for row in found[0].values())


@pytest.mark.usefixtures("_all_large")
def test_the_digest_knows_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = streamed("npy", tmp_path).fingerprint()
    assert streamed("npy", tmp_path).fingerprint() == before
    changed = X.copy()
    changed[77, 2] += 1e-9
    monkeypatch.setattr(stream_sets, "X", changed)
    assert streamed("npy", tmp_path).fingerprint() != before


@pytest.mark.usefixtures("_all_large")
def test_samples_that_come_in_another_order_are_noticed(tmp_path: Path) -> None:
    data = streamed("iterable", tmp_path)
    other = replace(data, held_labels=np.roll(data.held_labels, 1))
    with pytest.raises(ValueError, match=r"other labels than before.*same order"):
        an_epoch(other, 7)
