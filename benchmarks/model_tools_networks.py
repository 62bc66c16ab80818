"""Networks that other people wrote, as functions from images to logits, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["NETWORKS", "Network"]


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    batch: int
    size: int  # of the images, in pixels
    aim: float | None = None  # × eager on a training step, with `fuse`
    checked: int = 96  # size of the images on which answers are compared, in float64
    steps: int = 3  # training steps that are compared
    settling: int = 0  # images more than those of the batch that the statistics are taken of


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

        config = getattr(transformers, f"{name}Config")(num_labels=10, **settings)
        self.network = getattr(transformers, f"{name}ForImageClassification")(config)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def of(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: Logits(name, **settings)


_EFFICIENTNET_B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280,
                    "dropout_rate": 0.0, "drop_connect_rate": 0.0,
                    "initializer_range": 0.2}  # fmt: skip  # with 0.02 every image says the same

# Random parts (dropout, dropped paths) are off: two runs have to agree.
NETWORKS = {
    "ResNet-18 (CIFAR)": Network(cifar_resnet18, 32, 32, aim=1.2, checked=32),
    "MobileNetV2": Network(of("MobileNetV2", classifier_dropout_prob=0.0, tf_padding=False), 16, 224, aim=1.5),
    "MobileNetV2, padded apart": Network(of("MobileNetV2", classifier_dropout_prob=0.0), 16, 224),
    "MobileNetV1": Network(of("MobileNetV1", classifier_dropout_prob=0.0), 8, 224),
    "ResNet-50": Network(of("ResNet"), 8, 96),
    "RegNet": Network(of("RegNet"), 8, 96),
    "EfficientNet-B0": Network(of("EfficientNet", **_EFFICIENTNET_B0), 8, 96),
    # Its last layers normalize one vector an image, all nearly equal. In training, one rounding of the input moves
    # torch's own second step by far more than the limit. In eval, statistics of four such vectors make float32 of
    # torch's own differ from float64 by more than `fold` may: which folds it then takes back is chance.
    "LeViT-128S": Network(of("Levit", drop_path_rate=0), 4, 224, checked=224, steps=1, settling=60),
}


def settled(network: Network) -> tuple[nn.Module, Tensor]:
    """The network with γ and β away from 1 and 0, and with the statistics of its input: with the initial ones a signal
    would die on its way through many layers in eval, and zeros agree with zeros."""
    torch.manual_seed(0)
    model, x = network.make().train(), torch.randn(network.batch, 3, network.size, network.size)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.add_(torch.randn_like(norm.weight) * 0.2)
            norm.bias.add_(torch.randn_like(norm.bias) * 0.2)
            norm.momentum = 1.0
        model(torch.cat([x, torch.randn(network.settling, *x.shape[1:])]))
    for norm in norms:
        norm.momentum = 0.1
    return model, x
