"""`diagnose`: gathers the facts that were asked for, and lets every rule decide on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.optim import Optimizer

from ..errors import UserError
from .diagnosis import Diagnosis, Finding, by_harm
from .facts.batches import Batch, as_batch, collect
from .facts.facts import Facts, NotExamined, masks_of
from .facts.files import is_file, read_file
from .facts.layers import find_layers, model_trains
from .facts.measure import measure
from .facts.preserve import preserved
from .facts.ranks import Ranks, compare_ranks
from .facts.record import tensors_in
from .facts.symbolic import trace_graph
from .facts.training import Training, watch_steps
from .rule import Rule, chosen

__all__ = ["diagnose"]

# An example of fewer samples, or of constant values, shows shapes alone.
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
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
) -> Diagnosis:
    """Names what is wrong with batch normalization in a model.

    The model is called at most three times a batch, without gradients and with dropout off but for one pass; it
    comes back bit for bit as it was, as do the optimizer and the random generators, also after an exception.

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
        select, ignore: codes or prefixes ("BN2"), a sequence or comma-separated.

    Returns:
        A `Diagnosis`. What a rule needs and did not get is listed in ``not_examined``.

    Raises:
        UserError: arguments of the wrong form, a forward or step that raises, batches that end early.
    """
    rules = chosen(select, ignore)
    if is_file(model):
        assert not isinstance(model, nn.Module)
        facts = Facts(file=read_file(model))
        return _decide(rules, facts, str(model) if isinstance(model, (str, Path)) else "ExportedProgram")
    _check(model, optimizer, steps, step, batches)
    assert isinstance(model, nn.Module)
    with preserved(model, [optimizer] if optimizer is not None else []):
        facts = _gather(model, batches, example_input, mask, step, optimizer, process_group, rules)
    facts.optimizer, facts.loader, facts.steps = optimizer, loader, steps
    return _decide(rules, facts, type(model).__name__)


def _check(model: Any, optimizer: Any, steps: Any, step: Any, batches: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model is a {type(model).__name__}, diagnose(model), pass a torch.nn.Module, an ExportedProgram or a path"
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer is a {type(optimizer).__name__}, diagnose(optimizer=…), pass a torch.optim one")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise UserError(f"steps is {steps!r}, diagnose(steps=…), pass how many training steps are planned")
    if step is not None and not callable(step):
        raise UserError(f"step is a {type(step).__name__}, diagnose(step=…), pass a callable that trains on one batch")
    if step is not None and batches is None:
        raise UserError("step without batches, diagnose(step=…), pass batches for it to train on")


def _gather(
    model: nn.Module,
    batches: Any,
    example_input: Any,
    mask: Any,
    step: Callable[[Any], Any] | None,
    optimizer: Optimizer | None,
    process_group: Any,
    rules: tuple[Rule, ...],
) -> Facts:
    codes = {rule.code for rule in rules}
    masks = masks_of(mask)
    collected = collect(batches, model) if batches is not None else []
    examples = [as_batch(example_input, model, target=False)] if example_input is not None and not collected else []
    layers = find_layers(model)
    training: Training | None = None
    if step is not None and codes & {"BN301", "BN302"}:
        training = watch_steps(model, layers, collected, step, optimizer)
    # A lazy layer takes its shape from the first forward, for good: that one is not the user's to lose.
    runs_on = _copy_of_lazy(model) if collected or examples else model
    if runs_on is not model:
        layers = find_layers(runs_on)
    facts = Facts(model=runs_on, trains=model_trains(model), layers=layers, masked=masks is not None, training=training)
    facts.ranks = _ranks(runs_on, facts, process_group)
    if collected or examples:
        found = measure(
            runs_on,
            layers,
            collected or examples,
            masks=masks,
            compare_ways="BN202" in codes and bool(collected),
            try_dropout="BN105" in codes,
            spent=training.forwards if training else 0,
        )
        facts.measurements, facts.layers, facts.graph = found, found.layers, found.graph
        facts.real_batches = bool(collected) or _is_data(examples[0])
    else:
        facts.graph = trace_graph(model, layers)
    return facts


def _copy_of_lazy(model: nn.Module) -> nn.Module:
    buffers = [buffer for buffer in model.buffers() if is_lazy(buffer)]
    if not buffers and not any(is_lazy(parameter) for parameter in model.parameters()):
        return model
    # Of what has no shape yet, torch copies parameters but no buffers.
    new: Any = UninitializedBuffer
    return copy.deepcopy(model, {id(b): new(device=b.device, dtype=b.dtype) for b in buffers})


def _is_data(batch: Batch) -> bool:
    tensors = [t for t in tensors_in((batch.args, batch.kwargs)) if t.is_floating_point()]
    return batch.size >= _SAMPLES_OF_DATA and all(t.numel() > 1 and float(t.double().std()) > 0 for t in tensors)


def _ranks(model: nn.Module, facts: Facts, process_group: Any) -> Ranks | None:
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "process_group without torch.distributed, diagnose(process_group=…), call init_process_group on every rank"
        )
    return compare_ranks(model, facts.layers, process_group)


def _decide(rules: tuple[Rule, ...], facts: Facts, subject: str) -> Diagnosis:
    findings: list[Finding] = []
    not_examined: dict[str, str] = {}
    examined: list[str] = []
    with torch.no_grad():
        for rule in rules:
            try:
                findings += rule.examine(facts)
                examined.append(rule.code)
            except NotExamined as lacking:
                not_examined[rule.code] = str(lacking)
    return Diagnosis(tuple(sorted(findings, key=by_harm)), not_examined, tuple(examined), subject)
