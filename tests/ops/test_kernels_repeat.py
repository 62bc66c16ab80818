"""Bit for bit the same result for any number of threads, on each repeat; every instruction set; refusals; opcheck."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.ops import extension

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="the extension was not built here")

ops = torch.ops.batchnorm


def everything(x: Tensor, grad: Tensor, mask: Tensor | None, slice_size: int) -> list[Tensor]:
    weight, bias = torch.linspace(-1, 2, x.size(1)), torch.linspace(1, -1, x.size(1))
    form = (1e-5, "silu", 0.1, slice_size)
    out, mean, var, count = ops.forward(x, weight, bias, None, mask, *form)
    grads = ops.backward(grad, x, mean, var, count, weight, bias, None, mask, *form, [True, True, True, True])
    return [out, mean, var, count, *grads]


SHAPES = [
    (2, 1, 9001), (1, 3, 190, 181), (70, 9, 31, 17), (16, 33, 8, 8), (9000, 5), (3, 257, 50), (90, 450, 2, 2),
    (40, 300, 7, 7), (100, 700), (1, 5000, 4, 4),
]  # fmt: skip


@settings(max_examples=20)
@given(
    st.sampled_from(SHAPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1, 7]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_number_of_threads_gives_the_same_bits(
    shape: tuple[int, ...], last: bool, masked: bool, slice_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    mask = torch.rand(shape[0], x[0, 0].numel()) > 0.2 if masked else None
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            results.append(everything(x, grad, mask, slice_size))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_place_in_memory_changes_no_bit() -> None:
    """Aligned or not, streamed past the caches or not: sums are taken in the order of the shape."""
    x, grad = torch.randn(4, 7, 41, 3), torch.randn(4, 7, 41, 3)
    for offset in (1, 3):
        moved = torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)
        a, b = everything(x, grad, None, 0), everything(moved, grad, None, 0)
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


_PROGRAM = """
import hashlib, torch, sys
from batchnorm.ops import fused
ops = torch.ops.batchnorm
torch.set_num_threads(1)
digest = hashlib.sha256()
tolerances = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
for dtype, tolerance in tolerances.items():
    for shape in ((6, 37, 5, 3), (33, 21)):
        for last in (False, True):
            for activation in ("", "relu", "silu", "tanh"):
                torch.manual_seed(0)
                x, grad, residual = (torch.randn(shape).to(dtype) for _ in range(3))
                if last:
                    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
                form = (1e-3, activation, 0.1, 0)
                got = ops.forward(x, weight, bias, residual, None, *form)
                want = fused.forward(x, weight, bias, residual, None, *form)
                arguments = (grad, x, *got[1:], weight, bias, residual, None, *form, [True, True, True, True])
                grads, exact = ops.backward(*arguments), fused.backward(*arguments)
                for a, b in ((got[0], want[0]), (grads[0], exact[0]), (grads[3], exact[3])):
                    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=4 * tolerance)
                digest.update(got[1].numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(capability: str) -> None:
    """Where the processor lacks one, the next lower set is taken: the test then repeats that one."""
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, "BATCHNORM_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"residual": torch.randn(4, 6, 3)}, "residual of shape"),
        ({"residual": torch.randn(4, 6, 5).double()}, "dtype"),
        ({"weight": torch.randn(5)}, "weight of shape"),
        ({"bias": torch.ones(6, dtype=torch.int64)}, "bias must be a floating-point"),
        ({"mask": torch.ones(4, 5)}, "mask must be a bool"),
        ({"mask": torch.ones(4, 6, dtype=torch.bool)}, "mask of shape"),
        ({"activation": "gelu"}, "activation must be"),
        ({"input": torch.randn(4)}, "at least 2 dimensions"),
        ({"input": torch.ones(4, 6, 5, dtype=torch.int32)}, "takes float32"),
    ],
)
def test_refused_with_a_reason(change: dict, words: str) -> None:
    call = {
        "input": torch.randn(4, 6, 5), "weight": None, "bias": None, "residual": None, "mask": None,
        "eps": 1e-5, "activation": "", "negative_slope": 0.0, "slice_size": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        ops.forward(*{**call, **change}.values())


def test_no_memory_is_kept_call_after_call() -> None:
    """The stable ABI's own string argument leaks (see csrc/tensor.h): ours must not."""
    import resource

    x = torch.randn(2, 2)
    moments = ops.stats(x, None, 0)[:2]

    def call(times: int) -> None:
        for _ in range(times):
            ops.apply(x, *moments, None, None, None, 1e-5, "leaky_relu", 0.1, 0)

    call(2000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(20000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400  # KiB; one small string a call: 640


@pytest.mark.parametrize("last", [False, True])
def test_opcheck_on_every_operator(last: bool) -> None:
    x, grad, residual = (torch.randn(4, 6, 5, 3) for _ in range(3))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(6), torch.randn(6)
    mask = torch.rand(4, 15) > 0.3
    form = (1e-5, "relu", 0.1, 3)
    mean, var, count = ops.stats(x, mask, 3)
    sums = ops.backward_reduce(grad, x, mean, var, weight, bias, residual, mask, *form)
    running = torch.zeros(6), torch.ones(6), torch.zeros((), dtype=torch.int64)
    calls = {
        "stats": (x, mask, 3),
        "apply": (x, mean, var, weight, bias, residual, *form),
        "backward_reduce": (grad, x, mean, var, weight, bias, residual, mask, *form),
        "backward_elemt": (grad, x, mean, var, weight, bias, residual, mask, *sums, count, *form, True),
        "forward": (x, weight, bias, residual, mask, *form),
        "backward": (grad, x, mean, var, count, weight, bias, residual, mask, *form, [True, True, True, True]),
        "update_running_": (*running, mean, var, count, 0.1, False),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(ops, name).default, arguments)
