from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from torch import nn

from ...statistics.measured import Measured
from ..evidence.needs import Evidence, NotExamined
from ..evidence.normalizations import Layer, layers_of_trace
from ..evidence.ranks import world_size
from ..rule import Found, rule

_FEW_VALUES, _FEW_SAMPLES = 26, 16


@rule(
    "BN201",
    "too-few-values",
    summary="Statistics over too few values a channel, or a last batch of one sample.",
    order=100,
    needs=("sizes",),
    fix="larger batches, drop_last=True, or process_group='world', or group normalization for small batches",
    false_alarm="these batches are not those of the training",
)
def too_few_values(evidence: Evidence) -> Iterator[Found]:
    live = [(layer, seen) for layer, seen in evidence.observed() if layer.training and not layer.frozen]
    if evidence.loader is not None:
        yield from _of_loader(evidence, live)
        return
    if not any(layer.training and not layer.frozen for layer in evidence.layers):
        if evidence.layers:
            raise NotExamined("no layer takes batch statistics: the model is not in training mode")
        return
    if live:
        yield from _of_batches(live)


def _of_batches(live: list[tuple[Layer, Measured]]) -> Iterator[Found]:
    layer, seen = min(live, key=lambda pair: _values(*pair))
    values, samples = _values(layer, seen), _samples(layer, median(seen.batch_samples))
    if values < _FEW_VALUES or samples < _FEW_SAMPLES:
        yield _few(layer.name, values, samples, len(live))
    last_layer, last = min(live, key=lambda pair: pair[1].batch_counts[-1])
    alone = last.batch_samples[-1] == 1 and median(last.batch_samples) > 1
    if alone:
        yield _last_of_one(last_layer.name, last.batch_counts[-1])


def _few(name: str, values: float, samples: float, layers: int) -> Found:
    evidence: dict[str, float | int | str] = {"values": int(values), "samples": int(samples), "layers": layers}
    if values <= 1:
        return Found(name, "has one value a channel: training raises", evidence, severity="error")
    return Found(
        name,
        f"estimates a mean and a variance from {int(values)} values a channel of {int(samples)} samples",
        evidence,
    )


def _last_of_one(name: str, values: int | None) -> Found:
    raises = values == 1
    return Found(
        name,
        "the last batch holds one sample" + (": training raises on it" if raises else ""),
        {"last_batch": 1} if values is None else {"last_batch": 1, "values": values},
        severity="error" if raises else "warning",
        fix="drop_last=True in the DataLoader",
    )


def _of_loader(evidence: Evidence, live: list[tuple[Layer, Measured]]) -> Iterator[Found]:
    size, last = _batch_sizes(evidence.loader)
    if size is None:
        raise NotExamined("the loader has no fixed batch size to look at")
    layers = evidence.layers
    if not layers and evidence.graph is not None:  # functional calls, which only a trace shows
        layers = layers_of_trace(evidence.graph)
    norms = [layer for layer in layers if not layer.frozen and (layer.training or not evidence.trains)]
    if not norms:
        return
    per_sample = {layer.name: _values(layer, seen) / max(1, median(seen.batch_samples)) for layer, seen in live}
    name = min(per_sample, key=lambda n: per_sample[n]) if per_sample else norms[0].name
    flat = [layer for layer in norms if isinstance(layer.module, nn.BatchNorm1d)]
    samples = _samples(norms[0], size)
    values = samples * per_sample[name] if per_sample else None
    if samples < _FEW_SAMPLES or (values is not None and values < _FEW_VALUES):
        yield _few(name, values if values is not None else samples if flat else samples + 1, samples, len(norms))
    if last == 1 and size > 1:
        yield _last_of_one(name, 1 if per_sample.get(name) == 1 else None)


def _batch_sizes(loader: Any) -> tuple[int | None, int | None]:
    """Return the batch size and the size of the last batch, as far as the loader tells without being run."""
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
    drop = getattr(loader, "drop_last", False) or getattr(sampler, "drop_last", False)
    if not isinstance(size, int):
        return None, None
    for source in (getattr(sampler, "sampler", None), getattr(loader, "dataset", None)):
        try:
            total = len(source)  # type: ignore[arg-type]  # what has no length raises
        except (TypeError, NotImplementedError):
            continue
        return min(size, total), None if drop else (total % size or size)
    return size, None


def _samples(layer: Layer, samples: float) -> float:
    ghost = getattr(layer.module, "ghost_batch_size", None)
    return min(samples, ghost) if ghost else samples * _ranks(layer)


def _values(layer: Layer, seen: Measured) -> float:
    values = median(seen.batch_counts)
    return values * _samples(layer, median(seen.batch_samples)) / max(1.0, median(seen.batch_samples))


def _ranks(layer: Layer) -> int:
    synced = layer.kind == "sync" or getattr(layer.module, "process_group", None) is not None
    return world_size() if synced else 1
