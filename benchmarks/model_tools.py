"""Writes docs/model-tools-results.md: what convert, fuse and fold bring on networks that other people wrote.

    python benchmarks/model_tools.py [--only NAME,NAME] [--seconds 10] [--out FILE]

Each figure is the ratio of medians of interleaved runs in one process, eager torch over ours. Values are compared
before anything is timed. The ceiling is the same step with batch normalizations and activations taken out: what a
normalization that costs nothing would bring. Run it on an otherwise idle machine.
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

from batchnorm.bench.timing import interleaved, machine
from batchnorm.surgery import convert, fold, fuse
from batchnorm.surgery.kinds import is_norm
from batchnorm.surgery.replace import replace

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)


class Block(nn.Module):
    """The basic block of a ResNet, as He et al. wrote it."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


def cifar_resnet18() -> nn.Module:
    """ResNet-18 with the 3×3 stem that is used on CIFAR."""
    widths, layers = (64, 128, 256, 512), []
    channels = 64
    for stage, width in enumerate(widths):
        for block in range(2):
            layers.append(Block(channels, width, 2 if stage and not block else 1))
            channels = width
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Logits(nn.Module):
    """A classifier of transformers as a function from images to logits."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, f"{name}Config")(**settings)
        self.network = getattr(transformers, f"{name}ForImageClassification")(config)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


# network → (how it is made, batch size, image size)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ResNet-18 (CIFAR)": (cifar_resnet18, 32, 32),
    "MobileNetV2": (lambda: Logits("MobileNetV2", classifier_dropout_prob=0.0), 16, 224),
    "MobileNetV1": (lambda: Logits("MobileNetV1", classifier_dropout_prob=0.0), 16, 224),
    "ResNet-50": (lambda: Logits("ResNet"), 8, 96),
    "RegNet": (lambda: Logits("RegNet"), 8, 96),
    "EfficientNet-B0": (
        lambda: Logits("EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280,
                       dropout_rate=0.0, drop_connect_rate=0.0),
        8, 96,
    ),
    "LeViT-128S": (lambda: Logits("Levit", drop_path_rate=0), 4, 224),
}  # fmt: skip


def settle(model: nn.Module, x: Tensor) -> None:
    """Two steps in training mode, so that running statistics are not the initial ones."""
    with torch.no_grad():
        for _ in range(2):
            model(x)


def step_of(model: Any, parameters_of: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(parameters_of.parameters(), lr=1e-4)
    labels = torch.randint(0, 2, (len(x),), generator=torch.Generator().manual_seed(0))

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


def training(model: nn.Module, x: Tensor, seconds: float) -> dict[str, float]:
    """Speed-ups of a whole step: converted, fused, and the ceiling."""
    plain, converted, fused, bare = (copy.deepcopy(model).train() for _ in range(4))
    convert(converted)
    torch._dynamo.reset()
    steps = {
        "torch": step_of(plain, plain, x),
        "converted": step_of(converted, converted, x),
        "fused": step_of(fuse(fused), fused, x),
        "ceiling": step_of(bare := ceiling_of(bare), bare, x),
    }
    losses = {name: step().item() for name, step in steps.items()}
    for name in ("converted", "fused"):
        if abs(losses[name] - losses["torch"]) > 1e-3 * max(1.0, abs(losses["torch"])):
            raise AssertionError(f"the first losses differ: {losses}")
    times = interleaved(steps, seconds)
    return {name: times["torch"].p50 / times[name].p50 for name in ("converted", "fused", "ceiling")}


def evaluation(model: nn.Module, x: Tensor, seconds: float) -> tuple[str, dict[str, float]]:
    """How much was folded, and the speed-ups of a forward in eval."""
    model = copy.deepcopy(model).eval()
    folded, report = fold(model, (x,))
    torch._dynamo.reset()
    models = {"torch": model, "fused": fuse(copy.deepcopy(model)), "folded": folded}
    with torch.no_grad():
        expected = model(x)
        for name, other in models.items():
            worst = (other(x) - expected).abs().max() / expected.abs().max()
            if worst > 1e-3:
                raise AssertionError(f"{name} differs by {worst:.1e}")
        times = interleaved({name: lambda m=m: m(x) for name, m in models.items()}, seconds)
    share = f"{len(report.folded)}/{len(report.entries)}"
    return share, {name: times["torch"].p50 / times[name].p50 for name in ("fused", "folded")}


def row(name: str, seconds: float) -> str:
    make, batch, size = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(batch, 3, size, size)
    settle(model, x)
    share, speed = evaluation(model, x, seconds)
    cells = [name, f"{batch}×{size}²", share, f"{speed['folded']:.2f}", f"{speed['fused']:.2f}"]
    for layout in (torch.contiguous_format, torch.channels_last):
        found = training(model.to(memory_format=layout), x.to(memory_format=layout), seconds)  # type: ignore[call-overload]  # torch's stub lacks it
        cells.append(" · ".join(f"{found[kind]:.2f}" for kind in ("converted", "fused", "ceiling")))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the model tools bring on other people's networks.")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, comma-separated")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each comparison")
    parser.add_argument("--out", type=Path, default=Path("docs/model-tools-results.md"))
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name]
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(NETWORKS)}")
    rows = []
    for name in names:
        rows.append(row(name, options.seconds))
        print(rows[-1], flush=True)
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    options.out.write_text(
        "# What the model tools bring\n\n"
        "Made by `python benchmarks/model_tools.py`; the docstring says how. Speed-ups over eager torch, float32, "
        "medians of interleaved runs; for training, of the whole step (forward, backward, SGD).\n\n"
        f"Machine: {facts}.\n\n"
        "| network | input | folded | eval, folded | eval, fused | training, contiguous: converted · fused · ceiling "
        "| training, channels_last: converted · fused · ceiling |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nThe ceiling is the same step with batch normalizations and activations taken out.\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
