"""Networks that other people wrote: those of transformers with batch normalization, small and with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["ZOO", "build", "classify"]

_IMAGES = {"num_labels": 5}
# (model class, config class, settings, size of the image); small enough for a test, each kind of block in it.
ZOO: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        32,
    ),
    "resnet-bottleneck": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck"},
        32,
    ),
    "regnet": (
        "RegNetForImageClassification",
        "RegNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4},
        32,
    ),
    "mobilenet-v1": (
        "MobileNetV1ForImageClassification",
        "MobileNetV1Config",
        {"depth_multiplier": 0.25, "classifier_dropout_prob": 0.0},
        64,
    ),
    "mobilenet-v2": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.35, "classifier_dropout_prob": 0.0},
        64,
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {
            "width_coefficient": 0.25,
            "depth_coefficient": 0.2,
            "dropout_rate": 0.0,
            "drop_connect_rate": 0.0,
            "hidden_dim": 320,
            "initializer_range": 0.2,
            "image_size": 32,
        },
        32,
    ),
    "levit": (
        "LevitForImageClassification",
        "LevitConfig",
        {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
         "image_size": 128, "drop_path_rate": 0},
        128,
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "image_size": 64,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0},
        64,
    ),
    "cvt": (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 1, 1], "depth": [1, 2, 3], "drop_rate": [0.0] * 3,
         "drop_path_rate": [0.0] * 3, "attention_drop_rate": [0.0] * 3},
        64,
    ),
    "swiftformer": (
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "drop_path_rate": 0.0},
        64,
    ),
    "hgnet-v2": (
        "HGNetV2ForImageClassification",
        "HGNetV2Config",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "stem_channels": [3, 4, 8],
         "stage_in_channels": [8, 8, 16, 16], "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [8, 16, 16, 16],
         "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2]},
        64,
    ),
}  # fmt: skip


def build(name: str, **changes: Any) -> tuple[nn.Module, torch.Tensor]:
    """A network in float64 and training mode, every statistic away from its start, and a batch for it."""
    import transformers

    model_class, config_class, settings, size = ZOO[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**_IMAGES, **{**settings, **changes})
    model = getattr(transformers, model_class)(config).double().train()
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for norm in norms:  # at 1 and 0 a mistake in folding γ and β would not show
            norm.weight.add_(torch.randn_like(norm.weight) * 0.2)
            norm.bias.add_(torch.randn_like(norm.bias) * 0.2)
            norm.momentum = 1.0
        model(x)  # statistics of these data, else the signal dies on its way in eval
    for norm in norms:
        norm.momentum = 0.1
    return model, x


def classify(model: Any, x: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(pixel_values=x).logits
    return logits
