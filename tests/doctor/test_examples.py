"""The five examples: each finds its fault, and no longer after the repair."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "doctor"
NAMES = ["averaged_weights", "dropout_first", "half_frozen", "keras_momentum", "sorted_batches"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() == (True, False)
    sys.modules.pop("broken")
