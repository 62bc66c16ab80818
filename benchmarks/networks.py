"""Whole networks, converted, against torch eager: `python benchmarks/networks.py` (ten minutes on two idle cores).

A training step (forward, backward, SGD) and an evaluation of each network in both memory layouts, interleaved in one
process, as medians. "ceiling" is torch's step with normalizations and activations taken out: what no normalization can
beat. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from memory import timm_model
from model_tools_networks import cifar_resnet18
from torch import Tensor, nn

from batchnorm import convert
from batchnorm.bench import interleaved, machine, training_step
from batchnorm.inspect.modules import is_norm

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)


class UNet(nn.Module):
    """Four levels of two 3 × 3 convolutions, with skips by concatenation."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.down = nn.ModuleList(block(a, b) for a, b in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(block(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for up, skip in zip(self.up, kept[-2::-1], strict=True):
            x = up(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), skip], 1))
        out: Tensor = self.head(x)
        return out


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


# name: (network, batch, size)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ResNet-18 CIFAR": (cifar_resnet18, 32, 32),
    "ResNet-50": (timm_model("resnet50"), 8, 128),
    "MobileNetV2": (timm_model("mobilenetv2_100"), 16, 160),
    "MobileNetV2 small": (timm_model("mobilenetv2_100"), 64, 32),
    "EfficientNet-B0": (timm_model("efficientnet_b0"), 8, 128),
    "EfficientNet-B0 small": (timm_model("efficientnet_b0"), 8, 96),
    "DenseNet-121": (timm_model("densenet121"), 8, 96),
    "VGG-BN": (timm_model("vgg16_bn"), 16, 64),
    "U-Net": (UNet, 4, 128),
}


def without_norms(model: nn.Module) -> nn.Module:
    """The network with every normalization, and what activates, taken out."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_norm(child) or isinstance(child, ACTIVATIONS):
                setattr(parent, name, nn.Identity())
    return model


def evaluation_of(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


def check(theirs: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """The same outputs, as far as float32 tells."""
    with torch.no_grad():
        want, got = theirs(x).double(), ours(x).double()
    error = float((want - got).norm() / want.norm())
    assert error < 1e-2, f"outputs differ by {error:.1e}"


def measure(name: str, channels_last: bool, seconds: float) -> dict[str, float]:
    make, batch, size = NETWORKS[name]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    theirs: nn.Module = make().to(memory_format=layout).train()  # type: ignore[call-overload]  # torch types no memory_format here
    x = torch.randn(batch, 3, size, size).to(memory_format=layout)
    ours, bare = convert(copy.deepcopy(theirs)), without_norms(copy.deepcopy(theirs))
    check(copy.deepcopy(theirs), copy.deepcopy(ours), x)
    steps = {key: training_step(model, x) for key, model in (("torch", theirs), ("ours", ours), ("bare", bare))}
    train = {key: timing.p50 for key, timing in interleaved(steps, seconds).items()}
    runs = {key: evaluation_of(model.eval(), x) for key, model in (("torch", theirs), ("ours", ours))}
    evaluation = {key: timing.p50 for key, timing in interleaved(runs, seconds / 4).items()}
    return {
        "torch ms": train["torch"] * 1e3,
        "converted": train["torch"] / train["ours"],
        "ceiling": train["torch"] / train["bare"],
        "evaluation": evaluation["torch"] / evaluation["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="a comma-separated list")
    parser.add_argument("--seconds", type=float, default=25.0, help="of timing, a network and layout")
    options = parser.parse_args()
    print(machine())
    print("| network | layout | torch ms | converted | ceiling | evaluation |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.networks.split(","):
        for channels_last in (False, True):
            row = measure(name, channels_last, options.seconds)
            layout = "channels_last" if channels_last else "contiguous"
            print(
                f"| {name} | {layout} | {row['torch ms']:.0f} | {row['converted']:.2f} | {row['ceiling']:.2f} | "
                f"{row['evaluation']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
