"""Time a training step of a user's network with torch's batch normalization and with ours."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..inspect.nests import arguments_of, mapped, tensors_in
from .step_memory import StepMemory, StorageCount
from .timing import interleaved


def model_step(
    model: nn.Module, example: Any, seconds: float, layout: str = "contiguous", dtype: str = "float32"
) -> dict[str, Any]:
    """Time forward, backward and SGD step of `model` and of its converted copy, interleaved.

    Both start from the same parameters; the losses of the first step are compared before anything is timed.

    Args:
        model: a network with torch's batch normalization.
        example: its arguments: a tensor, a tuple or a dict.
        seconds: how long to measure.
        layout: "channels_last" converts parameters and 4-D inputs to that memory format.
        dtype: "bfloat16" uses autocast for the forward.

    Returns:
        The number of batch normalization layers, the layout, the dtype, the times and the speedup, and the memory of a
        step: with torch's layers, with ours, and with ours that rebuild outputs (`save_memory=True`).

    Raises:
        UserError: the network raises on the example, or has no batch normalization.
        AssertionError: the first losses differ.
    """
    from ..model_tools import convert

    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        example = mapped(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t, example)
    ours = convert(copy.deepcopy(model))
    layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in ours.modules())
    if not layers:
        raise UserError("the network has no batch normalization, bench_model(model=…), give one that has some")
    steps = {name: training_step(m.train(), example, dtype) for name, m in (("ours", ours), ("torch", model))}
    losses = {name: step() for name, step in steps.items()}
    limit = 1e-3 if dtype == "float32" else 1e-1  # a sum of many terms of both signs, each with a rounding error
    if abs(losses["ours"] - losses["torch"]) > limit * max(1.0, abs(losses["torch"])):
        raise AssertionError(f"the first losses differ: {losses}")
    times = interleaved(steps, seconds)
    memory = {
        name: dataclasses.asdict(step_memory(m, example, dtype)) for name, m in (("torch", model), ("ours", ours))
    }
    memory["save_memory"] = dataclasses.asdict(step_memory(convert(ours, save_memory=True), example, dtype))
    return {
        "layers": layers,
        "layout": layout,
        "dtype": dtype,
        "seconds": {name: vars(timing) for name, timing in times.items()},
        "speedup": times["torch"].p50 / times["ours"].p50,
        "memory": memory,
    }


def step_memory(model: nn.Module, example: Any, dtype: str = "float32") -> StepMemory:
    """Count what a forward of `model` keeps for the backward, and the peak of both."""
    device = next(model.parameters()).device.type
    model.zero_grad(set_to_none=True)
    with StorageCount() as count:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            result = _call(model, example)
        kept = count.memory(result)
        _first_tensor(result).float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return dataclasses.replace(kept, peak=count.peak)


def training_step(model: nn.Module, example: Any, dtype: str = "float32") -> Callable[[], float]:
    """Make a function that does forward, backward and an SGD step, and returns the loss.

    The forward uses autocast where the dtype is not float32.

    Raises:
        UserError: when the function is called and the network raises on the example.
    """
    device = next(model.parameters()).device.type
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    direction: list[Tensor] = []

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        try:
            with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
                out = _first_tensor(_call(model, example))
        except Exception as error:
            raise UserError(
                f"the network raises on its example ({str(error).splitlines()[0]}), bench_model(model=…), "
                "correct its shape"
            ) from error
        if not direction:
            # a random direction, because the gradient of .sum() through a batch normalization is 0
            generator = torch.Generator().manual_seed(0)
            direction.append(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
        loss = (out * direction[0]).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _call(model: nn.Module, example: Any) -> Any:
    arguments, keywords = arguments_of(example)
    return model(*arguments, **keywords)


def _first_tensor(result: Any) -> Tensor:
    return tensors_in(result)[0]
