"""Networks of the transformers library with batch normalization: small, new or trained a little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.doctor.faults import Call

IMAGES = (3, 32, 32)


def _images(count: int, size: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "pixel_values": torch.randn(size, *IMAGES, generator=generator),
            "labels": torch.randint(3, (size,), generator=generator),
        }
        for _ in range(count)
    ]


def _series(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "past_values": torch.randn(32, 32, 2, generator=generator),
            "future_values": torch.randn(32, 4, 2, generator=generator),
        }
        for _ in range(count)
    ]


def networks() -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[dict[str, Tensor]]]]]:
    """Return, by name, the functions that make a network and its batches. They need transformers."""
    import transformers as hf

    return {
        "ResNet": (
            lambda: hf.ResNetForImageClassification(
                hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
            ),
            _images,
        ),
        "RegNet": (
            lambda: hf.RegNetForImageClassification(
                hf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=3)
            ),
            _images,
        ),
        "MobileNetV2": (
            lambda: hf.MobileNetV2ForImageClassification(
                hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=3, classifier_dropout_prob=0.1)
            ),
            _images,
        ),
        "PatchTST": (lambda: hf.PatchTSTForPrediction(_series_configuration()), _series),
    }


def _series_configuration() -> Any:
    import transformers as hf

    return hf.PatchTSTConfig(
        num_input_channels=2,
        context_length=32,
        patch_length=4,
        patch_stride=4,
        prediction_length=4,
        d_model=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=16,
        norm_type="batchnorm",
        attention_dropout=0.0,
        positional_dropout=0.0,
        ff_dropout=0.0,
        head_dropout=0.1,
    )


def trained(make: Callable[[], nn.Module], batches: list[dict[str, Tensor]], steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    return model


def healthy() -> Iterator[tuple[str, Callable[[], Call]]]:
    for name, (make, batches) in networks().items():
        if name == "MobileNetV2":  # its configuration keeps TensorFlow's momentum, 0.997
            continue
        yield f"transformers' {name}, new", lambda m=make, b=batches: {"model": m().train(), "batches": b(4)}
        yield (
            f"transformers' {name}, 4 steps",
            lambda m=make, b=batches: {"model": trained(m, b(4), 4), "batches": b(4)},
        )


def faults() -> Iterator[tuple[str, str, Callable[[], Call]]]:
    for name, (make, batches) in networks().items():
        yield (
            f"transformers' {name}, evaluated new",
            "BN106",
            lambda m=make, b=batches: {
                "model": m().eval(),
                "batches": b(2),
            },
        )
        if name == "MobileNetV2":
            yield f"transformers' {name}, as it comes", "BN102", lambda m=make: {"model": m().train()}
        yield f"transformers' {name}, half", "BN112", lambda m=make: {"model": m().half()}
