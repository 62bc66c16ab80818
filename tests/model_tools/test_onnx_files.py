"""Weights in files of their own stay there; a failure leaves nothing behind."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from batchnorm.errors import UserError
from batchnorm.model_tools import fold_onnx
from batchnorm.model_tools.onnx_files import Draft
from tests.onnx_nets import RNG, norm, save, tensor


def external(tmp_path, location="weights.bin"):
    first, weights = norm("bn", "c", 64)
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), first]
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 64, 8, 3)], [2, 8, 9], ["bn.out"])
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location=location, size_threshold=256)
    return path


def run(path, x):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("place", ["there/folded.onnx", "n.onnx"])
@pytest.mark.parametrize("location", ["weights.bin", "n.onnx.data"])
def test_external_weights_stay_external(tmp_path, place, location):
    path, target = external(tmp_path, location), tmp_path / place
    target.parent.mkdir(exist_ok=True)
    x = RNG.standard_normal((2, 8, 9)).astype(np.float32)
    expected = run(path, x)
    before = (tmp_path / location).stat().st_size
    for _ in range(2):  # the second finds the target's own file there
        report = fold_onnx(path, target)
        assert report.verified
    onnx.checker.check_model(str(target), full_check=True)
    assert target.stat().st_size < 2000
    assert (target.parent / f"{target.name}.data").stat().st_size <= before
    np.testing.assert_allclose(run(target, x), expected, rtol=1e-4, atol=1e-4)
    assert {file.name for file in target.parent.iterdir()} <= {
        "n.onnx", "there", location, target.name, f"{target.name}.data"
    }  # fmt: skip


def test_missing_weights_are_one_sentence(tmp_path):
    path = external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"fold_onnx: .*weights\.bin") as caught:
        fold_onnx(path, tmp_path / "folded.onnx")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["n.onnx"]


def test_a_link_stays_a_link(tmp_path):
    path, real, link = external(tmp_path), tmp_path / "real.onnx", tmp_path / "link.onnx"
    link.symlink_to(real)
    fold_onnx(path, link)
    assert link.is_symlink()
    assert real.exists()
    onnx.checker.check_model(str(real), full_check=True)


def test_a_draft_is_written_anew(tmp_path):
    """onnx appends to a file of weights that is there."""
    model = onnx.load(str(external(tmp_path)))
    with Draft(onnx, tmp_path / "target.onnx", external=True) as draft:
        sizes = [(draft.write(model).parent / "target.onnx.data").stat().st_size for _ in range(3)]
        assert len(set(sizes)) == 1
        assert model.graph.initializer[-1].raw_data  # the model keeps its weights
    assert not any(file.is_dir() for file in tmp_path.iterdir())
