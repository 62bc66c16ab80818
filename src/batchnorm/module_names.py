"""The full name under which a model knows a module: for messages, where the time to look does not matter."""

from __future__ import annotations

import gc

from torch import nn


def full_name(module: nn.Module) -> str:
    """Like "layer1.0.bn1 (BatchNorm2d(64))": the longest path by which a living model reaches the module."""
    paths = [
        name
        for root in gc.get_objects()
        if issubclass(type(root), nn.Module)  # isinstance would wake proxies that warn
        for name, child in root.named_modules()
        if child is module and name
    ]
    kind = f"{type(module).__name__}({getattr(module, 'num_features', '')})"
    return f"{max(paths, key=len)} ({kind})" if paths else kind
