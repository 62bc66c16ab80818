"""Compiles, for a GPU that need not be there, every kernel that some calls would launch; one JSON line a kernel.

Run in a process of its own, without the interpreter: `python -m tests.ops.compile_triton 90`. Triton's compiler and
the assembler in its wheel need no GPU. Each launch is replaced by the compilation of exactly what it would launch.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from batchnorm.ops.triton import (
    apply,
    backward,
    backward_elemt,
    backward_reduce,
    coefficients,
    forward,
    launch,
    stats,
    update_running_,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Absent:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def describe(kernel, programs, *arguments, **meta):
    compiled = kernel.warmup(*arguments, grid=(programs,), **meta)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage.stdout)
    assert found, usage.stdout
    registers, stack, local = map(int, found.groups())
    ptx = compiled.asm["ptx"]
    facts = {"kernel": kernel.__name__, "registers": registers, "stack": stack, "local": local}
    facts |= {"shared": compiled.metadata.shared, "warps": meta["num_warps"]}
    facts["atomics"] = bool(re.search(r"\b(atom|red)\.", ptx))
    # 16 bytes a thread: asynchronous copies where a loop runs ahead, plain loads elsewhere
    facts["wide"] = bool(re.search(r"cp\.async\.c[ag]\.shared\.global .*0x10|global[\w.]*\.v4\.b32", ptx))
    # −(a·b) + c in one instruction: of float32 in the search for moments, x less a mean that was never rounded
    negated = set(re.findall(r"neg\.f32\s+(%\w+)", ptx))
    facts["fused_difference"] = any(
        negated.intersection(pair) for pair in re.findall(r"fma\.rn\.f32\s+%\w+, (%\w+), (%\w+)", ptx)
    )
    print(json.dumps(facts))


CASES = [  # shape, dtype, channels innermost, masked, slice_size, activation
    ((32, 64, 56, 56), torch.bfloat16, True, False, 0, "relu"),
    ((32, 64, 14, 14), torch.float32, False, True, 8, "tanh"),
]
MORE = [
    ((32, 64, 56, 56), torch.float16, False, True, 0, "silu"),
    ((8, 64, 56, 56), torch.float32, True, True, 2, "leaky_relu"),
    ((8, 48, 28, 28), torch.float64, True, False, 0, "hardswish"),
    ((8, 48, 28, 28), torch.float64, False, False, 0, "sigmoid"),
    ((60, 100), torch.float32, True, False, 0, "relu6"),
    ((4, 1, 5), torch.bfloat16, False, True, 1, ""),
]


def exercise(shape, dtype, last, masked, slice_size, activation):
    """Call the operators, hence every kernel that serves this tensor."""
    x = torch.empty(shape, dtype=dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    mask = torch.ones(shape[0], x[0, 0].numel(), dtype=torch.bool) if masked else None
    form = (1e-5, activation, 0.1, slice_size)
    _, *moments = forward.forward(x, weight, bias, x, mask, *form)
    apply.apply(x, *moments[:2], weight, bias, x, *form)
    backward.backward(x, x, *moments, weight, bias, x, mask, *form, [True] * 4)
    buffers = (torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0))
    update_running_.update_running_(*buffers, *moments, 0.1, True)
    forward.forward_update_running_(x, weight, bias, x, mask, *buffers, 0.1, False, *form)


def main(capability, cases):
    triton.runtime.driver.set_active(Absent(capability))
    launch.multiprocessors = lambda device: 132
    for module in (apply, backward, backward_elemt, backward_reduce, coefficients, forward, stats, update_running_):
        module.run = describe
    for case in cases:
        exercise(*case)


if __name__ == "__main__":
    main(int(sys.argv[1]), CASES + MORE if "all" in sys.argv else CASES)
