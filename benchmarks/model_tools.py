"""Writes docs/model-tools-results.md: what convert, fuse and fold bring on networks that other people wrote.

    python -m benchmarks.model_tools [--only NAME,NAME] [--seconds 4] [--out FILE] [--resume]

First the answers: in float64, converted = original and fused = eager over three training steps (outputs, gradients,
parameters, buffers), folded = original and reverted = plain torch in eval; a network that fails is not timed. Then the
time: each figure is the ratio of medians of interleaved runs in one process, eager torch over ours. The ceiling is the
same step with batch normalizations and activations taken out: what a normalization that costs nothing would bring.

The file is written anew after every network, so that a run that is cut short loses nothing; with `--resume` the
networks that the file holds already, measured on the same machine, are not measured again. Run it on an otherwise idle
machine: about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.bench.timing import Timing, interleaved, machine
from batchnorm.inspect.modules import is_norm
from batchnorm.model_tools import convert, fold, fuse
from batchnorm.model_tools.replace import replace

from .model_tools_check import LIMIT, differences
from .model_tools_networks import NETWORKS, Network, settled

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)
CHECKED = ("converted", "fused", "folded", "reverted")
HEAD = (
    "| network | input | folded | eval: folded · fused | training, contiguous: converted · fused (ceiling) "
    "| training, channels_last: converted · fused (ceiling) "
    "| largest difference: converted · fused · folded · reverted |"
)


def step_of(model: Any, holder: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One training step: forward, backward, SGD."""
    optimizer = torch.optim.SGD(holder.parameters(), lr=1e-4)
    labels = torch.randint(0, 10, (len(x),), generator=torch.Generator().manual_seed(0))

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def ceiling_of(model: nn.Module) -> nn.Module:
    taken = replace(copy.deepcopy(model), lambda _, m: nn.Identity() if is_norm(m) or type(m) in ACTIVATIONS else None)
    return taken.root


def training(model: nn.Module, x: Tensor, seconds: float) -> dict[str, Timing]:
    """A whole step of the network as it is, converted, fused, and with nothing left to speed up."""
    plain, converted, fused, bare = (copy.deepcopy(model).train() for _ in range(4))
    convert(converted)
    torch._dynamo.reset()
    return interleaved(
        {
            "torch": step_of(plain, plain, x),
            "converted": step_of(converted, converted, x),
            "fused": step_of(fuse(fused), fused, x),
            "ceiling": step_of(bare := ceiling_of(bare), bare, x),
        },
        seconds,
        least=5,
    )


def evaluation(model: nn.Module, x: Tensor, seconds: float) -> tuple[str, dict[str, Timing]]:
    """How much was folded, and a forward in eval of the network as it is, fused and folded."""
    model = copy.deepcopy(model).eval()
    folded, report = fold(model, (x,))
    torch._dynamo.reset()
    models = {"torch": model, "fused": fuse(copy.deepcopy(model)), "folded": folded}
    with torch.no_grad():
        times = interleaved({name: lambda m=m: m(x) for name, m in models.items()}, seconds, least=5)
    return f"{len(report.folded)}/{len(report.entries)}", times


def speed(times: dict[str, Timing], name: str) -> str:
    return f"{times['torch'].p50 / times[name].p50:.2f}"


def row(name: str, network: Network, seconds: float) -> str:
    model, x = settled(network)
    found = differences(model, x[:4, :, : network.checked, : network.checked], network.steps)
    wrong = {kind: value for kind, value in found.items() if not value <= LIMIT}
    if wrong:
        raise SystemExit(f"model_tools: {name} differs from eager torch: {wrong}; no time is measured")
    share, evaluated = evaluation(model, x, seconds)
    cells = [name, f"{network.batch}×{network.size}²", share]
    cells.append(f"{speed(evaluated, 'folded')} · {speed(evaluated, 'fused')}")
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=layout)
        times = training(model, x.to(memory_format=layout), seconds)
        cells.append(f"{speed(times, 'converted')} · {speed(times, 'fused')} ({speed(times, 'ceiling')})")
    cells.append(" · ".join(f"{found[kind]:.0e}" for kind in CHECKED))
    return f"| {' | '.join(cells)} |"


def aims(rows: dict[str, str]) -> list[str]:
    """What was aimed at for `fuse` on a training step, beside what was measured and could be had."""
    lines = []
    for name, line in rows.items():
        aim = NETWORKS[name].aim
        if aim is not None:
            contiguous, channels_last = (cell.split(" · ")[1].strip() for cell in line.split("|")[5:7])
            lines.append(f"* {name}: {aim} × eager; contiguous {contiguous}, channels_last {channels_last}.")
    return lines


def page(rows: dict[str, str], facts: str) -> str:
    return "\n".join(
        [
            "# What the model tools bring",
            "",
            "Made by `python -m benchmarks.model_tools`, whose docstring says how. Speed-ups over eager torch, "
            "float32, medians of interleaved runs; in training, of the whole step (forward, backward, SGD). In "
            "brackets the ceiling: the same step with batch normalizations and activations taken out. Differences "
            "are in float64, relative to the largest value, over three training steps (converted, fused) or in "
            "eval (folded, reverted).",
            "",
            f"Machine: {facts}.",
            "",
            HEAD,
            "|" + "---|" * 7,
            *rows.values(),
            "",
            "Padded apart is the default of transformers: each convolution of MobileNetV2 gets its zeros from a call "
            "of `F.pad` before it, a copy that no tool here touches.",
            "",
            "What was aimed at for a training step with `fuse`, and what was measured (ceiling):",
            "",
            *aims(rows),
            "",
        ]
    )


def kept(path: Path, facts: str) -> dict[str, str]:
    """The rows that an earlier run on this machine left in the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if f"Machine: {facts}." not in text:
        return {}
    names = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    return {name: line for name, line in names.items() if name in NETWORKS}


def main() -> None:
    parser = argparse.ArgumentParser(description="What the model tools bring on other people's networks.")
    parser.add_argument("--only", default="", help="beginnings of the networks' names, comma-separated; else all")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each comparison, at least five rounds")
    parser.add_argument("--out", type=Path, default=Path("docs/model-tools-results.md"))
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file holds")
    options = parser.parse_args()
    wanted = tuple(name.strip() for name in options.only.split(",")) if options.only else ("",)
    names = [name for name in NETWORKS if name.startswith(wanted)]
    if not names:
        parser.error(f"{options.only} is the beginning of none of {', '.join(NETWORKS)}")
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    rows = kept(options.out, facts) if options.resume else {}
    for name in names:
        if name not in rows:
            rows[name] = row(name, NETWORKS[name], options.seconds)
            options.out.write_text(page(rows, facts), encoding="utf-8")
        print(rows[name], flush=True)


if __name__ == "__main__":
    main()
