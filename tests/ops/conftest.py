"""The two implementations of the training call, one after the other."""

import pytest

from batchnorm import execution, layer_call
from batchnorm.ops import autograd
from tests.ops.training import COMPILED


@pytest.fixture(params=["python", "c++"])
def call(request, monkeypatch):
    """The function that serves; layers come through it too."""
    if request.param == "c++" and COMPILED is None:
        pytest.skip("csrc/autograd was not built against this torch")
    chosen = autograd.python_training_call if request.param == "python" else COMPILED.training_call
    monkeypatch.setattr(execution, "training_call", chosen)
    if request.param == "python":
        monkeypatch.setattr(layer_call, "plain_training_call", lambda *_: None)
        monkeypatch.setattr(layer_call, "plain_running_call", lambda *_: None)
    return chosen
