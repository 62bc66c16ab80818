"""TorchScript: a trace computes the same; a script is refused in one line that says what to script instead."""

from __future__ import annotations

import io

import pytest
import torch

import batchnorm
from batchnorm.errors import UserError

from .nets import KINDS, assert_same_calls, images, pair


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # F.batch_norm's own, which looks at the shape
def test_trace(kind, training):
    """A trace keeps the mode it was made in, with torch's operators alone."""
    theirs, ours = (model.train(training) for model in pair(kind))
    x = images()
    traced, expected = (torch.jit.trace(model, x, check_trace=False) for model in (ours, theirs))
    assert "batchnorm::" not in str(traced.inlined_graph)
    assert_same_calls(traced, expected, modes=(training, training))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_saved_and_loaded(kind):
    theirs, ours = (model.eval() for model in pair(kind))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, images()), file)
    file.seek(0)
    x = images(3)
    torch.testing.assert_close(torch.jit.load(file)(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_script(kind):
    theirs, ours = pair(kind)
    with pytest.raises(UserError, match=r"batchnorm\.revert\(model\)") as refused:
        torch.jit.script(ours)
    assert "\n" not in str(refused.value)
    scripted = torch.jit.script(batchnorm.revert(ours))
    assert_same_calls(scripted, theirs, tolerance=1e-6)  # the derivative is TorchScript's own


def test_script_of_a_sequential_alone():
    _, ours = pair("convert")
    with pytest.raises(UserError, match=r"batchnorm\.revert\(model\)"):
        torch.jit.script(ours.stem)
    torch.jit.script(batchnorm.revert(ours.stem))


@pytest.mark.parametrize("kind", KINDS)
def test_freeze_and_optimize_of_a_trace(kind):
    """torch folds the norms of a frozen trace into its convolutions."""
    theirs, ours = (model.eval() for model in pair(kind))
    frozen = torch.jit.freeze(torch.jit.trace(ours, images()))
    x = images(3)
    torch.testing.assert_close(frozen(x), theirs(x), rtol=1e-8, atol=1e-8)
