"""Triton's compiler and NVIDIA's assembler accept the kernels: what the interpreter cannot show, and without a GPU."""

import importlib.util
import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
    reason="needs Triton's compiler and the assembler in its wheel, which is there for Linux on x86_64",
)
TINY = {"_merge_stats", "_merge_sums", "_coefficients", "_update_running_"}
ALL = TINY | {"_stats", "_apply", "_backward_reduce", "_backward_elemt", "_forward", "_backward"}


def compiled(tmp_path, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.ops.compile_triton", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_hopper(tmp_path):
    kernels = compiled(tmp_path, "90")
    assert {k["kernel"] for k in kernels} == ALL
    for kernel in kernels:
        assert not kernel["atomics"]
        assert kernel["local"] == 0, f"{kernel} spills registers"
        if kernel["kernel"] in ("_stats", "_forward"):
            assert not kernel["fused_difference"], f"{kernel} subtracts a shift from x before it is rounded"
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536 // 2, f"{kernel}: one block a multiprocessor"
    large = [k for k in kernels[:8] if k["kernel"] not in TINY]
    assert all(k["wide"] for k in large), "a sweep over channels_last bfloat16 moves 16 bytes a thread"


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "89", "90"])
def test_every_dtype_layout_and_activation_compiles(capability, tmp_path):
    for kernel in compiled(tmp_path, capability, "all"):
        assert not kernel["atomics"]
        assert not (kernel["kernel"] in ("_stats", "_forward") and kernel["fused_difference"])
        assert kernel["shared"] <= 64 * 1024, f"{kernel} exceeds a block's shared memory on small GPUs"
