"""Which compiled training call is opened, and that its glance at the arguments lets nothing through."""

import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import batchnorm
from batchnorm import BatchNorm1d, validation
from batchnorm.ops import extension
from tests.ops.training import COMPILED

needs_compiled = pytest.mark.skipif(COMPILED is None, reason="csrc/autograd was not built against this torch")


def loaded(folder: Path, code: str) -> str:
    """What the code prints in a process of its own, in which the package also lies in `folder` and only there."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def copy_without_compiled(folder: Path) -> Path:
    source = Path(batchnorm.__file__).parent
    target = folder / "batchnorm"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("_autograd*", "csrc", "__pycache__", "experiment"))
    return target


SERVES = (
    "import os, batchnorm, torch; from batchnorm.ops import autograd;"
    "assert batchnorm.__file__.startswith(os.getcwd());"
    "batchnorm.BatchNorm1d(3)(torch.randn(4, 3, requires_grad=True)).sum().backward();"
    "print(autograd.training_call == autograd.python_training_call)"
)


@needs_compiled
def test_the_module_of_another_torch_is_not_opened(tmp_path):
    """It lies there under another version's name, and would load if it were asked for."""
    package = copy_without_compiled(tmp_path)
    built = Path(COMPILED.__file__)
    this = re.sub(r"\W", "_", torch.__version__)
    shutil.copy(built, package / built.name.replace(this, "2_9_9_cpu"))
    maps = "; print('2_9_9' in open('/proc/self/maps').read())" if sys.platform == "linux" else ""
    assert loaded(tmp_path, SERVES + maps).split() in (["True"], ["True", "False"])
    shutil.copy(built, package / built.name)
    assert loaded(tmp_path, SERVES) == "False"


@needs_compiled
@pytest.mark.parametrize("content", [b"", b"\x7fELF and no more"])
def test_a_module_that_does_not_load_is_done_without(tmp_path, content):
    (copy_without_compiled(tmp_path) / Path(COMPILED.__file__).name).write_bytes(content)
    assert loaded(tmp_path, SERVES) == "True"


def test_a_torch_without_a_module():
    assert extension.autograd_module("0.0.1+other") is None


def variants():
    """Arguments of the checks, right and wrong: (input, running_mean, running_var, weight, bias, eps, slice_size)."""
    inputs = [
        torch.randn(4, 3), torch.randn(1, 3), torch.randn(1, 3, 2), torch.randn(0, 3), torch.randn(4, 3).half(),
        torch.randn(4, 3).bfloat16(), torch.randn(4, 3).double(), torch.ones(4, 3, dtype=torch.int), torch.randn(3),
        torch.randn(4, 3, device="meta"), torch.randn(4, 3, 0), torch.randn(1, 0), torch.randn(4, 3).to_sparse(),
        torch.randn(4, 3, dtype=torch.complex64),
    ]  # fmt: skip
    vectors = [
        torch.zeros(3), None, torch.zeros(2), torch.zeros(1, 3), torch.zeros(3).double(), torch.zeros(3).half(),
        torch.zeros(3, device="meta"), torch.zeros(1).expand(3), torch.zeros(3, requires_grad=True), torch.zeros(0),
    ]  # fmt: skip
    sizes = [(1e-5, 0), (0.0, 0), (-1.0, 0), (float("nan"), 0), (1, 0), (1e-5, 1), (1e-5, 2), (1e-5, -2), (1e-5, 2.0)]
    for x, mean, (eps, slice_size) in product(inputs, vectors, sizes):
        yield x, mean, torch.ones(3), None, None, eps, slice_size
    for x, var, weight, bias in product(inputs, vectors, vectors, vectors):
        yield x, torch.zeros(3), var, weight, bias, 1e-5, 0


def refused(x, mean, var, weight, bias, eps, slice_size):
    try:
        validation.check_input(x, True, eps, slice_size or None, synchronized=False)
        validation.check_buffers(mean, var, True)
        validation.check_vectors(x, mean, var, weight, bias)
    except (RuntimeError, ValueError, NotImplementedError):
        return True
    return False


def fits(x, mean, var, weight, bias, eps, slice_size):
    out = COMPILED.plain_training_call(
        x, weight, bias, None, mean, var, torch.tensor(0), 0.1, eps, "", 0.01, slice_size
    )
    return out is not None


@needs_compiled
def test_the_glance_lets_nothing_through_that_the_checks_refuse():
    passed = [arguments for arguments in variants() if fits(*arguments)]
    assert len(passed) > 50
    assert not [arguments for arguments in passed if refused(*arguments)]


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 3), (1, 3, 2), (4, 3, 2, 2)])
def test_the_glance_suffices_for_a_layer(shape, dtype):
    for layer in (BatchNorm1d(3, dtype=dtype), BatchNorm1d(3, affine=False, dtype=dtype)):
        vectors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        assert fits(torch.randn(shape, dtype=dtype), *vectors, layer.eps, 0)
        assert fits(torch.randn(shape, dtype=dtype), *vectors, layer.eps, 2)


@needs_compiled
def test_the_glance_leaves_what_is_no_tensor_to_the_checks():
    good = (torch.randn(4, 3), torch.zeros(3), torch.ones(3), None, None, 1e-5, 0)
    for index in range(5):
        assert not fits(*(3.0 if i == index else a for i, a in enumerate(good)))
    assert not fits(*good[:6], "2")
