"""The two implementations of the training call, one after the other."""

import pytest

from batchnorm import functional
from batchnorm.ops import TrainingCall
from tests.ops.training import COMPILED


@pytest.fixture(params=["python", "c++"])
def call(request, monkeypatch):
    """The function that serves; layers come through it too."""
    if request.param == "c++" and COMPILED is None:
        pytest.skip("csrc/autograd was not built against this torch")
    chosen, fits = (
        (TrainingCall.apply, lambda *_: False) if request.param == "python" else (COMPILED.training_call, COMPILED.fits)
    )
    monkeypatch.setattr(functional, "_training_call", chosen)
    monkeypatch.setattr(functional, "fits", fits)
    return chosen
