"""`diagnose`: gathers the evidence that the chosen rules ask for, and lets every rule decide on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.optim import Optimizer

from ..errors import UserError
from ..inspect.from_fx import graph_of_trace
from ..inspect.nests import tensors_in
from ..inspect.untouched import preserved
from .diagnosis import SEVERITIES, Diagnosis, Finding
from .evidence.answers import Metric
from .evidence.exported_files import is_file, read_file
from .evidence.input_batches import Batch, as_batch, collect, masks_of
from .evidence.needs import CouldNotLook, Evidence, NotExamined
from .evidence.normalizations import Layer, find_layers, model_trains
from .evidence.passes import measure
from .evidence.ranks import Ranks, compare_ranks, is_distributed
from .evidence.training_steps import watch_steps
from .rule import Rule
from .rules import chosen_rules, codes_of

__all__ = ["diagnose"]

# An example input of fewer samples, or of constant values, shows only shapes.
_SAMPLES_OF_DATA = 8


def diagnose(
    model: nn.Module | ExportedProgram | str | Path,
    batches: Iterable[Any] | None = None,
    *,
    example_input: Any = None,
    optimizer: Optimizer | None = None,
    loader: Any = None,
    mask: Callable[[Any], Tensor] | str | None = None,
    steps: int | None = None,
    step: Callable[[Any], Any] | None = None,
    process_group: Any = None,
    metric: Metric | None = None,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    per_layer_ignores: Mapping[str, str | Iterable[str]] | None = None,
) -> Diagnosis:
    """Name what is wrong with batch normalization in a model.

    The model is called at most three times for each batch, without gradients, and with dropout off in all passes but
    one. Model, optimizer and random generators come back bit for bit as they were, also after an exception.

    Args:
        model: any module; or an ``ExportedProgram``, or the path of a .pt2 or .onnx file.
        batches: iterable of inputs or (input, target), each a tensor, a tuple or a dict. The first 10,000 samples
            (in at least 32 batches) are looked at.
        example_input: one input, for the graph and the shapes, where no batches are at hand; a tuple is the
            positional arguments.
        optimizer: looked at for weight decay; its state comes back unchanged.
        loader: a DataLoader that is looked at without being run.
        mask: batch → bool tensor, True = a real position, or the name of a batch's key.
        steps: how many training steps are planned.
        step: runs one training step on one batch; a few are run and undone.
        process_group: "world" or a group: compares the ranks' buffers, by collectives that every rank must join.
        metric: (output, target) → how good the answer is, larger is better: one value a sample, or one number.
        metric: (output, target) → how good the answer is, larger is better: one value a sample, or one number.
        select, ignore: codes, prefixes of codes or names of rules, a sequence or comma-separated.
        per_layer_ignores: the same for the layers whose names fit a pattern: ``{"backbone.*": "momentum-convention"}``.

    Returns:
        A `Diagnosis`, with the symptom first: how good the answers are with batch, running and recalibrated statistics.
        What a rule needs and did not get is listed in ``not_examined``.

    Raises:
        UserError: arguments of the wrong form, a forward or step that raises, batches that end early.
    """
    rules = chosen_rules(select, ignore)
    if is_file(model):
        assert not isinstance(model, nn.Module)
        subject = "ExportedProgram" if isinstance(model, ExportedProgram) else str(model)
        return _decide(rules, Evidence(file=read_file(model)), subject).without(_ignored(per_layer_ignores))
    _check(model, optimizer, steps, step, batches)
    if metric is not None and not callable(metric):
        raise UserError(f"metric is a {type(metric).__name__}, diagnose(metric=…), pass (output, target) → number")
    assert isinstance(model, nn.Module)
    with preserved(model, [optimizer] if optimizer is not None else []):
        evidence = _gather(model, batches, example_input, mask, step, optimizer, process_group, metric, rules)
    evidence.optimizer, evidence.loader, evidence.steps = optimizer, loader, steps
    return _decide(rules, evidence, type(model).__name__).without(_ignored(per_layer_ignores))


def _ignored(per_layer_ignores: Mapping[str, str | Iterable[str]] | None) -> dict[str, set[str]]:
    given = per_layer_ignores or {}
    return {pattern: set(codes_of(codes, "per_layer_ignores")) for pattern, codes in given.items()}


def _check(model: Any, optimizer: Any, steps: Any, step: Any, batches: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model is a {type(model).__name__}, diagnose(model=…), pass a Module, an ExportedProgram or a path"
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer is a {type(optimizer).__name__}, diagnose(optimizer=…), pass a torch.optim one")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise UserError(f"steps is {steps!r}, diagnose(steps=…), pass how many training steps are planned")
    if step is not None and not callable(step):
        raise UserError(f"step is a {type(step).__name__}, diagnose(step=…), pass a callable that trains on one batch")
    if step is not None and batches is None:
        raise UserError("step without batches, diagnose(batches=…), pass batches for it to train on")


def _gather(
    model: nn.Module,
    batches: Any,
    example_input: Any,
    mask: Any,
    step: Callable[[Any], Any] | None,
    optimizer: Optimizer | None,
    process_group: Any,
    metric: Metric | None,
    rules: tuple[Rule, ...],
) -> Evidence:
    asked = {name for rule in rules for name in (*rule.needs, *rule.wants)}
    masks = masks_of(mask)
    collected = collect(batches, model) if batches is not None else []
    examples = [as_batch(example_input, model, target=False)] if example_input is not None and not collected else []
    layers = find_layers(model)
    training = watch_steps(model, layers, collected, step, optimizer) if step is not None and "step" in asked else None
    # A lazy layer takes its shape from its first forward, for good. So a copy runs, and the user's layer stays lazy.
    runs_on = _copy_of_lazy(model) if collected or examples else model
    if runs_on is not model:
        layers = find_layers(runs_on)
    evidence = Evidence(runs_on, model_trains(model), layers, masked=masks is not None, training=training)
    evidence.ranks = _ranks(runs_on, layers, process_group)
    if collected or examples:
        found = measure(
            runs_on,
            layers,
            collected or examples,
            masks=masks,
            compare_ways="comparison" in asked and bool(collected),
            try_dropout="dropout" in asked,
            spent=training.forwards if training else 0,
            metric=metric,
        )
        evidence.measurements, evidence.layers, evidence.graph = found, found.layers, found.graph
        evidence.real_batches = bool(collected) or _is_data(examples[0])
    else:
        evidence.graph = graph_of_trace(model)
    return evidence


def _copy_of_lazy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with lazy tensors, and any other model as it is."""
    buffers = [buffer for buffer in model.buffers() if is_lazy(buffer)]
    if not buffers and not any(is_lazy(parameter) for parameter in model.parameters()):
        return model
    # torch copies lazy parameters but not lazy buffers, so each of these is given its copy.
    new: Any = UninitializedBuffer
    return copy.deepcopy(model, {id(b): new(device=b.device, dtype=b.dtype) for b in buffers})


def _is_data(batch: Batch) -> bool:
    tensors = [t for t in tensors_in((batch.args, batch.kwargs)) if t.is_floating_point()]
    return batch.size >= _SAMPLES_OF_DATA and all(t.numel() > 1 and float(t.double().std()) > 0 for t in tensors)


def _ranks(model: nn.Module, layers: list[Layer], process_group: Any) -> Ranks | None:
    if process_group is None:
        return None
    if not is_distributed():
        raise UserError(
            "process_group without torch.distributed, diagnose(process_group=…), call init_process_group on every rank"
        )
    return compare_ranks(model, layers, process_group)


def _decide(rules: tuple[Rule, ...], evidence: Evidence, subject: str) -> Diagnosis:
    order = {rule.code: rule.order for rule in rules}
    findings: list[Finding] = []
    not_examined: dict[str, str] = {}
    blind: dict[str, str] = {}
    with torch.no_grad():
        for rule in rules:
            try:
                findings += rule.examine(evidence)
            except NotExamined as lacking:
                not_examined[rule.code] = str(lacking)
                blind |= {rule.code: str(lacking)} if isinstance(lacking, CouldNotLook) else {}
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), order[finding.code], finding.module))
    examined = tuple(rule.code for rule in rules if rule.code not in not_examined)
    symptom = evidence.measurements.symptom if evidence.measurements else None
    return Diagnosis(tuple(findings), not_examined, examined, subject, symptom, blind)
