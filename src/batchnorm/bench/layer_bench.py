"""Time a training step of one layer: ours against torch eager and against a copy of its tensor.

The results are ratios of medians of interleaved calls in one process. They are not absolute times, because drift and
noise affect both sides of a ratio. The values are compared with float64 before anything is timed.
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
LayerCall = Callable[[Tensor, Tensor | None], Tensor]
# One layer of each stage of a ResNet-50 at batch 8, and small fully connected ones: all take seconds.
SHAPES = "8x64x112x112,8x256x56x56,8x512x28x28,8x1024x14x14,8x2048x7x7,256x1024,60x100"
# The same at batch 256, a usual batch size for a GPU.
SHAPES_CUDA = "256x64x112x112,256x256x56x56,256x512x28x28,256x1024x14x14,256x2048x7x7,4096x1024,60x100"
# The memory traffic that forward and backward need at least, in copies of the tensor (a copy reads and writes it once).
# It assumes that a channel stays in cache between its two passes: x→y, and x, dy→dx (with a residual r: x, r→y, and
# x, r, dy→dx, dr).
LEAST_COPIES = {"bn": 2.5, "bn+relu": 2.5, "bn+add+relu": 4.0}
# On a GPU a channel of a large tensor does not stay in cache: x twice → y, and x, dy twice → dx (with a residual r: x,
# then x, r → y, and x, dy, r → dr, then x, dr → dx).
LEAST_COPIES_CUDA = {"bn": 4.0, "bn+relu": 4.0, "bn+add+relu": 5.5}


@dataclass(frozen=True)
class Problem:
    """The tensor and the layer to time."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    case: str

    @property
    def label(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout} {self.case}"


def parse_shapes(shapes: str) -> list[tuple[int, ...]]:
    """Parse shapes such as "8x64x56x56,60x100".

    Raises:
        UserError: a shape is not 2 to 5 positive numbers joined by x.
    """
    found = []
    for word in shapes.split(","):
        sizes = word.strip().lower().split("x")
        if not 2 <= len(sizes) <= 5 or not all(size.isdigit() and int(size) for size in sizes):
            raise UserError(f"shape {word.strip()!r} is not like 8x64x56x56 (N, C, sizes), bench(shapes=…), correct it")
        found.append(tuple(map(int, sizes)))
    return found


def parse_choice(words: str, allowed: Iterable[str], parameter: str) -> list[str]:
    """Parse a comma-separated list of words.

    Raises:
        UserError: a word is not in `allowed`.
    """
    chosen = [word.strip() for word in words.split(",")]
    for word in chosen:
        if word not in allowed:
            raise UserError(f"unknown {word!r}, bench({parameter}=…), choose from {', '.join(allowed)}")
    return chosen


def tensors(problem: Problem, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make a random input (a leaf), grad_output and residual in the problem's dtype and layout."""

    def make() -> Tensor:
        values = torch.randn(problem.shape, device=device).to(DTYPES[problem.dtype])
        if problem.layout == "channels_last":
            values = values.movedim(1, -1).contiguous().movedim(-1, 1)
        return values

    return make().requires_grad_(), make(), make().requires_grad_() if "add" in problem.case else None


def layers_of(problem: Problem, device: str) -> tuple[nn.Module, nn.Module]:
    """Make our and torch's layer for the shape."""
    dimensions = max(1, len(problem.shape) - 2)
    ours = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)[dimensions - 1]
    theirs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    activation = "relu" if "relu" in problem.case else None
    channels = problem.shape[1]
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    return ours(channels, activation, device=device, dtype=dtype), theirs(channels, device=device, dtype=dtype)


def torch_way(layer: nn.Module, problem: Problem, in_place: bool) -> LayerCall:
    """Make the same call in torch eager as models write it; with `in_place`, as torchvision's models do."""

    def call(input: Tensor, residual: Tensor | None) -> Tensor:
        out = layer(input)
        if residual is not None:
            out = out.add_(residual) if in_place else out + residual
        return F.relu(out, inplace=in_place) if "relu" in problem.case else out

    return call


def calls_of(problem: Problem, device: str) -> dict[str, LayerCall]:
    """Make the calls to compare: ours and torch's; on a GPU also torch without cuDNN, and compiled."""
    ours, theirs = layers_of(problem, device)
    calls: dict[str, LayerCall] = {"ours": ours, "torch": torch_way(theirs, problem, in_place=False)}
    if problem.case != "bn":
        calls["torch_in_place"] = torch_way(theirs, problem, in_place=True)
    if device == "cuda":
        calls["native"] = calls["torch"]
        torch._dynamo.reset()  # each shape would count as a recompilation, and beyond a limit torch would not compile
        calls["compiled"] = torch.compile(torch_way(theirs, problem, in_place=False), dynamic=False)
    return calls


def contenders(
    problem: Problem, calls: dict[str, LayerCall], device: str, backward: bool
) -> dict[str, Callable[[], object]]:
    """Make one training step for each call, and a copy of the tensor."""
    input, grad_output, residual = tensors(problem, device)
    target = torch.empty_like(input.detach())

    def step(call: LayerCall) -> Callable[[], object]:
        def run() -> None:
            out = call(input, residual)
            if backward:
                out.backward(grad_output)
                input.grad = None
                if residual is not None:
                    residual.grad = None

        return run

    steps = {name: step(call) for name, call in calls.items()}
    if "native" in steps:
        steps["native"] = without_cudnn(steps["native"])
    return steps | {"copy": lambda: target.copy_(input.detach())}


def without_cudnn(function: Callable[[], object]) -> Callable[[], object]:
    """Make the call use torch's own kernels. By default version, dtype and layout decide whether torch uses cuDNN."""

    def run() -> object:
        with torch.backends.cudnn.flags(enabled=False):
            return function()

    return run


def check_values(problem: Problem, device: str) -> float:
    """Compare our output and input gradient with float64.

    Returns:
        The largest error, relative to the largest value.

    Raises:
        AssertionError: the error is more than a few roundings of the dtype, so that wrong results are never timed.
    """
    samples = max(2, min(problem.shape[0], 2**20 // max(1, torch.Size(problem.shape[1:]).numel())))
    small = Problem((samples, *problem.shape[1:]), problem.dtype, problem.layout, problem.case)
    input, grad_output, residual = tensors(small, device)
    ours, _ = layers_of(small, device)
    exact = [t.detach().double().contiguous().requires_grad_() for t in (input, residual) if t is not None]
    want = F.batch_norm(exact[0], None, None, training=True) + (exact[1] if residual is not None else 0)
    if "relu" in small.case:
        # near 0 rounding decides whether ReLU passes the gradient, so both sides get the gradient 0 there
        grad_output = grad_output.masked_fill(want.detach().abs() < 4 * torch.finfo(DTYPES[small.dtype]).eps, 0)
        want = want.relu()
    out = ours(input, residual)
    found = torch.autograd.grad(out, input, grad_output)[0]
    wanted = torch.autograd.grad(want, exact[0], grad_output.double())[0]
    error = max(_relative(out, want), _relative(found, wanted))
    assert error <= 16 * torch.finfo(DTYPES[small.dtype]).eps, f"{small.label}: relative error {error:.2g}"
    return error


def _relative(found: Tensor, wanted: Tensor) -> float:
    # At a kink the derivative depends on the rounding of z. The few values there are left out.
    difference = (found.detach().double() - wanted.detach()).abs().flatten()
    worst = difference.kthvalue(max(1, int(difference.numel() * 0.9999))).values
    return (worst / wanted.detach().abs().max().clamp(min=1e-30)).item()


def measure(problem: Problem, device: str = "cpu", seconds: float = 0.6) -> dict[str, Any]:
    """Make one row: times of forward, and of forward and backward, with their ratios to torch and to a copy."""
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
    """Time evaluation with running statistics: ours against torch and a copy."""
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
