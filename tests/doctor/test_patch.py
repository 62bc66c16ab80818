"""A patch of the function that makes the model: it applies, it changes what it says, and else lines are given."""

import importlib.util
import subprocess

import pytest
import torch
from torch import nn

from batchnorm.doctor.change import Change
from batchnorm.doctor.patch import lines_to_paste, patch_of

CHANGES = [
    Change("BN102", "0", "momentum", "0.9", "0.1", "{}.momentum = 0.25", safe=False),
    Change("BN102", "2", "momentum", "0.9", "0.1", "{}.momentum = 0.25", safe=False),
    Change("BN202", "0", "running statistics", "", ""),
]
NET = "nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))"
FUNCTIONS = {
    "an expression": f"def make():\n    return {NET}\n",
    "a pair": f"def make():\n    return {NET}, [1]\n",
    "a variable": f"def make():\n    model = {NET}\n    return model\n",
    "another variable": f"def make():\n    net = {NET}\n    return net, [1]\n",
    "one line": f"def make(): return {NET}\n",
    "several lines": f"def make():\n    return (\n        {NET},\n        [1],\n    )\n",
    "two returns": f"def make(big=False):\n    if big:\n        return {NET}\n    return {NET}\n",
    "decorated": f"import functools\n@functools.cache\ndef make():\n    return {NET}\n",
    "a function inside": f"def make():\n    def inner():\n        return 3\n    inner()\n    return {NET}\n",
}


def load(path):
    spec = importlib.util.spec_from_file_location("made", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_it_applies(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "made.py"
    path.write_text("from torch import nn\n\n" + FUNCTIONS[kind])
    patch = patch_of(CHANGES, load(path))
    assert patch.startswith("--- a/made.py\n+++ b/made.py\n@@ ")
    subprocess.run(["patch", "-p1"], input=patch, text=True, cwd=tmp_path, check=True, capture_output=True)
    made = load(path)()
    model = made[0] if isinstance(made, tuple) else made
    assert [model[0].momentum, model[2].momentum] == [0.25, 0.25]
    assert "unsafe" in path.read_text()


@pytest.mark.parametrize("factory", [None, torch.nn.init.zeros_, len, lambda: 3], ids=["none", "torch", "C", "lambda"])
def test_lines_to_paste(factory):
    if factory is torch.nn.init.zeros_:
        factory = type("Callable", (), {"__call__": lambda self: None})()
    patch = patch_of(CHANGES, factory)
    assert patch.startswith("# paste")
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    exec(patch, {"model": model})
    assert [model[0].momentum, model[2].momentum] == [0.25, 0.25]
    assert len(lines_to_paste(CHANGES[:1])) == 1


def test_nothing_to_patch():
    assert patch_of(CHANGES[2:], None) == ""
