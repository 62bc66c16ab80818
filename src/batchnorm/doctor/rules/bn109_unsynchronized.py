from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..evidence.needs import Evidence
from ..evidence.normalizations import Layer
from ..evidence.ranks import is_distributed, world_size
from ..rule import Found, rule


@rule(
    "BN109",
    "unsynchronised",
    summary="A synchronized batch normalization that cannot synchronize: no process group, or the wrong device.",
    order=140,
    needs=("model",),
    fix="call init_process_group before training, or batchnorm.convert(model, process_group='world') for any backend",
    false_alarm="the process group is made, and the model moved, only after this examination",
)
def unsynchronized(evidence: Evidence) -> Iterator[Found]:
    assert evidence.model is not None
    parallel = any(isinstance(module, nn.DataParallel) for module in evidence.model.modules())
    for layer in evidence.layers:
        own_group = layer.kind == "module" and getattr(layer.module, "process_group", None) is not None
        if not layer.training or not (layer.kind == "sync" or own_group):
            continue
        found = _what_is_wrong(layer, parallel)
        if found is not None:
            yield Found(layer.name, found[0], {"ranks": world_size(), "device": _device(layer)}, severity=found[1])


def _what_is_wrong(layer: Layer, parallel: bool) -> tuple[str, str] | None:
    if parallel and layer.kind == "sync":
        return "SyncBatchNorm does not work in DataParallel: one process a device is needed", "error"
    if not is_distributed():
        return "no process group: each process would normalize by its own batch, without a word", "warning"
    if layer.kind == "sync" and _device(layer) == "cpu":
        return "torch's SyncBatchNorm raises on the CPU as soon as there is a process group", "error"
    return None


def _device(layer: Layer) -> str:
    held = next((t for t in (layer.running_mean, layer.weight) if t is not None), None)
    return "unknown" if held is None else held.device.type
