"""One layer's training step: ours against torch eager and against the cost of a copy of its tensor.

Ratios of medians over interleaved runs in one process, never absolute times: drift and noise hit both sides. Values
are compared with float64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .timing import clock_of, interleaved

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("contiguous", "channels_last")
CASES = ("bn", "bn+relu", "bn+add+relu")
Call = Callable[[Tensor, Tensor | None], Tensor]
# One layer of each stage of a ResNet-50 at batch 8, and a small fully connected one: seconds in all.
SHAPES = "8x64x112x112,8x256x56x56,8x512x28x28,8x1024x14x14,8x2048x7x7,256x1024,60x100"
# The same at batch 256, which a GPU trains with.
SHAPES_CUDA = "256x64x112x112,256x256x56x56,256x512x28x28,256x1024x14x14,256x2048x7x7,4096x1024,60x100"
# A copy moves every byte twice; these are the least passes, in copies, that forward and backward can do with where a
# channel stays in cache between its two passes: x→y, and x, dy→dx (a residual r: x, r→y, and x, r, dy→dx, dr).
LEAST_COPIES = {"bn": 2.5, "bn+relu": 2.5, "bn+add+relu": 4.0}
# No GPU keeps a large tensor's channel: x twice → y, and x, dy twice → dx (with a residual r: x, then x, r → y, and
# x, dy, r → dr, then x, dr → dx).
LEAST_COPIES_CUDA = {"bn": 4.0, "bn+relu": 4.0, "bn+add+relu": 5.5}


@dataclass(frozen=True)
class Problem:
    """One thing to time."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    case: str

    @property
    def label(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout} {self.case}"


def parse_shapes(shapes: str) -> list[tuple[int, ...]]:
    """ "8x64x56x56,60x100" as tuples.

    Raises:
        UserError: a shape that is not 2 to 5 positive numbers joined by x.
    """
    found = []
    for word in shapes.split(","):
        sizes = word.strip().lower().split("x")
        if not 2 <= len(sizes) <= 5 or not all(size.isdigit() and int(size) for size in sizes):
            raise UserError(f"shape {word.strip()!r} is not like 8x64x56x56 (N, C and sizes), --shapes, correct it")
        found.append(tuple(map(int, sizes)))
    return found


def parse_choice(words: str, allowed: Iterable[str], option: str) -> list[str]:
    """A comma-separated list of known words.

    Raises:
        UserError: a word that is not among `allowed`.
    """
    chosen = [word.strip() for word in words.split(",")]
    for word in chosen:
        if word not in allowed:
            raise UserError(f"unknown {word!r}, {option}, choose from {', '.join(allowed)}")
    return chosen


def tensors(problem: Problem, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input (a leaf), grad_output and residual, random, in the problem's dtype and layout."""

    def make() -> Tensor:
        values = torch.randn(problem.shape, device=device).to(DTYPES[problem.dtype])
        if problem.layout == "channels_last":
            values = values.movedim(1, -1).contiguous().movedim(-1, 1)
        return values

    return make().requires_grad_(), make(), make().requires_grad_() if "add" in problem.case else None


def layers_of(problem: Problem, device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's layer for the shape."""
    dimensions = max(1, len(problem.shape) - 2)
    ours = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)[dimensions - 1]
    theirs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    activation = "relu" if "relu" in problem.case else None
    channels = problem.shape[1]
    pair = ours(channels, activation, device=device), theirs(channels, device=device)
    if problem.dtype == "float64":
        return pair[0].double(), pair[1].double()
    return pair


def torch_way(layer: nn.Module, problem: Problem, in_place: bool) -> Call:
    """The same in torch eager, as models write it; `in_place` as torchvision's do."""

    def call(input: Tensor, residual: Tensor | None) -> Tensor:
        out = layer(input)
        if residual is not None:
            out = out.add_(residual) if in_place else out + residual
        return F.relu(out, inplace=in_place) if "relu" in problem.case else out

    return call


def calls_of(problem: Problem, device: str) -> dict[str, Call]:
    """The layer each way, ours first; on a GPU also without cuDNN, and compiled."""
    ours, theirs = layers_of(problem, device)
    calls: dict[str, Call] = {"ours": ours, "torch": torch_way(theirs, problem, in_place=False)}
    if problem.case != "bn":
        calls["torch_in_place"] = torch_way(theirs, problem, in_place=True)
    if device == "cuda":
        calls["native"] = calls["torch"]
        torch._dynamo.reset()  # or this shape would count as one more recompilation of the last, and soon run eagerly
        calls["compiled"] = torch.compile(torch_way(theirs, problem, in_place=False), dynamic=False)
    return calls


def contenders(
    problem: Problem, calls: dict[str, Call], device: str, backward: bool
) -> dict[str, Callable[[], object]]:
    """One training step of the layer each way, and a copy of the tensor."""
    input, grad_output, residual = tensors(problem, device)
    target = torch.empty_like(input.detach())

    def step(call: Call) -> Callable[[], object]:
        def run() -> None:
            out = call(input, residual)
            if backward:
                out.backward(grad_output)
                input.grad = None
                if residual is not None:
                    residual.grad = None

        return run

    runs = {name: step(call) for name, call in calls.items()}
    if "native" in runs:
        runs["native"] = without_cudnn(runs["native"])
    return runs | {"copy": lambda: target.copy_(input.detach())}


def without_cudnn(function: Callable[[], object]) -> Callable[[], object]:
    """The call on torch's own kernels: whether torch takes cuDNN's depends on its version, the dtype and the layout."""

    def run() -> object:
        with torch.backends.cudnn.flags(enabled=False):
            return function()

    return run


def check_values(problem: Problem, device: str) -> float:
    """The largest error of ours against float64, relative to the largest value; output and input's gradient.

    Raises:
        AssertionError: more than a few roundings of the dtype: nothing wrong is ever timed.
    """
    samples = max(2, min(problem.shape[0], 2**20 // max(1, torch.Size(problem.shape[1:]).numel())))
    small = Problem((samples, *problem.shape[1:]), problem.dtype, problem.layout, problem.case)
    input, grad_output, residual = tensors(small, device)
    ours, _ = layers_of(small, device)
    exact = [t.detach().double().contiguous().requires_grad_() for t in (input, residual) if t is not None]
    want = F.batch_norm(exact[0], None, None, training=True) + (exact[1] if residual is not None else 0)
    if "relu" in small.case:
        # where it is zero but for a rounding, a ReLU may pass the gradient in one precision and not in the other
        grad_output = grad_output.masked_fill(want.detach().abs() < 4 * torch.finfo(DTYPES[small.dtype]).eps, 0)
        want = want.relu()
    out = ours(input, residual)
    found = torch.autograd.grad(out, input, grad_output)[0]
    wanted = torch.autograd.grad(want, exact[0], grad_output.double())[0]
    error = max(_relative(out, want), _relative(found, wanted))
    assert error <= 16 * torch.finfo(DTYPES[small.dtype]).eps, f"{small.label}: relative error {error:.2g}"
    return error


def _relative(found: Tensor, wanted: Tensor) -> float:
    # where a kink's two sides round apart the derivative jumps: such a position is the dtype's, not the kernel's
    difference = (found.detach().double() - wanted.detach()).abs().flatten()
    worst = difference.kthvalue(max(1, int(difference.numel() * 0.9999))).values
    return (worst / wanted.detach().abs().max().clamp(min=1e-30)).item()


def measure(problem: Problem, device: str = "cpu", seconds: float = 0.6) -> dict[str, Any]:
    """One row: times of forward, and of forward and backward, with their ratios to torch and to a copy."""
    row: dict[str, Any] = {**asdict(problem), "error": check_values(problem, device)}
    calls, clock = calls_of(problem, device), clock_of(device)
    for name, backward in (("forward", False), ("both", True)):
        times = interleaved(contenders(problem, calls, device, backward), seconds / 2, clock=clock)
        row[name] = {
            "seconds": {contender: asdict(timing) for contender, timing in times.items()},
            "speedup": times["torch"].p50 / times["ours"].p50,
            "copies": times["ours"].p50 / times["copy"].p50,
        }
        for other in ("in_place", "native", "compiled"):
            contender = "torch_in_place" if other == "in_place" else other
            if contender in times:
                row[name][f"speedup_{other}"] = times[contender].p50 / times["ours"].p50
    row["least_copies"] = (LEAST_COPIES_CUDA if device == "cuda" else LEAST_COPIES)[problem.case]
    return row


def evaluation(problem: Problem, device: str = "cpu", seconds: float = 0.3) -> dict[str, float]:
    """Inference: one pass with the running statistics, ours against torch and a copy."""
    input, _, residual = tensors(problem, device)
    ours, theirs = (layer.eval() for layer in layers_of(problem, device))
    call, target = torch_way(theirs, problem, in_place=False), torch.empty_like(input.detach())
    with torch.no_grad():
        times = interleaved(
            {
                "ours": lambda: ours(input, residual),
                "torch": lambda: call(input, residual),
                "copy": lambda: target.copy_(input),
            },
            seconds,
            clock=clock_of(device),
        )
    return {
        "speedup": times["torch"].p50 / times["ours"].p50,
        "copies": times["ours"].p50 / times["copy"].p50,
    }
