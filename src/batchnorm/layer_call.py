"""A layer's call: what it holds and what it is asked, told to `functional.batch_norm` or, where it remembers, to
`execution`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistError

from .domains import by_sample, check_domain
from .execution import (
    Call,
    Where,
    channels_second,
    move,
    normalize,
    plain_running_call,
    plain_training_call,
    recomputing,
    where_we_run,
)
from .functional import batch_norm
from .module_names import full_name
from .moments import Moments
from .ops import Form, fused
from .rebuild import can_rebuild, mark_output
from .running_stats import COMPILED_INSIDE_CHECKPOINT, Memory, SeenCall

__all__ = ["run_layer"]

_REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError, IndexError)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def run_layer(
    layer: Any,
    input: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    domain: int | Tensor | None = None,
    activation: str = "",
    negative_slope: float = 0.01,
    inplace: bool = False,
) -> Tensor:
    """A call of one of our layers, with what follows it in the same operator."""
    if input.dim() not in layer.usual_dims:
        layer._check_input_dim(input)
    options = layer.options
    rebuilt = layer.save_memory and can_rebuild(input, residual)
    if options.plain and mask is domain is None and not (inplace or rebuilt or _is_dynamo_compiling()):
        # straight from nn.Module's dictionaries: its own look-up of five names costs half of what the operator does;
        # what lies elsewhere (pruned, parametrized) fits no fast call
        buffers, parameters = layer._buffers, layer._parameters
        weight, bias = parameters.get("weight", ...), parameters.get("bias", ...)
        mean, var = buffers.get("running_mean"), buffers.get("running_var")
        out = None
        if layer.frozen or not layer.training:
            out = plain_running_call(input, weight, bias, residual, mean, var, layer.eps, activation, negative_slope)
        elif layer.track_running_stats:
            out = plain_training_call(
                input, weight, bias, residual, mean, var, buffers.get("num_batches_tracked"), layer.momentum,
                layer.eps, activation, negative_slope, options.ghost_batch_size or 0,
            )  # fmt: skip
        if out is not None:
            return out
    # a node in C++ shows nobody what it keeps
    remembers = rebuilt or domain is not None or options.domains is not None or options.remembers
    run = _run_domains if remembers else _run_plainly
    try:
        out = run(layer, input, residual, mask, domain, activation, negative_slope, inplace)
    except Exception as error:
        kind = RuntimeError if isinstance(error, DistError) else type(error)
        if kind not in _REFUSALS:  # a compiler's own, which means something to it
            raise
        raise kind(f"{full_name(layer)}: {_circumstance(layer, error)}{error}") from error
    if rebuilt:
        mark_output(layer, out)
    return out


def _circumstance(layer: Any, error: Exception) -> str:
    """What the layer knows beside the operators' own message."""
    if layer.options.process_group is not None and isinstance(error, RuntimeError):
        return "synchronized batch norm failed: "  # of all ranks one fails first
    if not layer.training and layer.uses_batch_statistics():
        return "it keeps no running statistics and normalizes by the batch in eval() too: "
    return ""


def _run_plainly(
    layer: Any,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    _domain: int | Tensor | None,
    activation: str,
    negative_slope: float,
    inplace: bool,
) -> Tensor:
    """One call that keeps nothing but the buffers."""
    options = layer.options
    # read once: each look at a buffer or parameter is a search through nn.Module's dictionaries
    mean, var, training = layer.running_mean, layer.running_var, layer.uses_batch_statistics()
    keep = layer.track_running_stats or not layer.training or layer.frozen
    given = {} if options.plain and options.ghost_batch_size is None else _call_options(options)
    return batch_norm(
        input, mean if keep else None, var if keep else None, layer.weight, layer.bias, training, layer.momentum,
        layer.eps, activation=activation or None, residual=residual, mask=mask, negative_slope=negative_slope,
        num_batches_tracked=layer.num_batches_tracked if training and keep else None, inplace=inplace, **given,
    )  # fmt: skip


def _call_options(options: Any) -> dict[str, Any]:
    """What a call that remembers nothing is asked for."""
    names = ("ghost_batch_size", "process_group", "feature_axis")
    return {name: value for name, value in options.changed().items() if name in names}


def _run_domains(
    layer: Any,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    domain: int | Tensor | None,
    activation: str,
    negative_slope: float,
    inplace: bool,
) -> Tensor:
    axis = layer.options.feature_axis
    if axis != 1:
        moved = channels_second(axis, input, residual, mask)
        return _run_chosen(layer, *moved, domain, activation, negative_slope).movedim(1, axis)
    return _run_chosen(layer, input, residual, mask, domain, activation, negative_slope)


def _run_chosen(
    layer: Any,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    domain: int | Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    form = Form(layer.eps, activation, negative_slope, layer.options.ghost_batch_size or 0)

    def one_domain(input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: int) -> Tensor:
        return _run_domain(layer, input, residual, mask, domain, form)

    chosen = layer.domain if domain is None else domain
    if isinstance(chosen, Tensor) and chosen.dim():
        return by_sample(layer, input, residual, mask, chosen, one_domain)
    return one_domain(input, residual, mask, check_domain(layer.options.domains, int(chosen)))


def _run_domain(
    layer: Any, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: int, form: Form
) -> Tensor:
    """One domain's call, which moves the buffers when and by what the layer's `RunningStats` say."""
    options, memory, remembered = layer.options, layer.memory(domain), layer.running_stats
    training = layer.uses_batch_statistics()
    keep = layer.track_running_stats or not layer.training or layer.frozen
    call = Call(
        input, memory.running_mean if keep else None, memory.running_var if keep else None, memory.num_batches_tracked,
        memory.weight, memory.bias, residual, mask, training, layer.momentum, form, None, options.process_group,
    )  # fmt: skip
    again, before = training and recomputing(), memory
    if options.renorm is not None and training:
        before = (_recalled(layer, domain, call) if again else None) or memory.copy()
        call = call._replace(
            running_mean=before.running_mean if keep else None,
            running_var=before.running_var if keep else None,
            num_batches_tracked=before.num_batches_tracked,
            renorm=options.renorm,
        )
    out, moments = normalize(call)
    if moments is None or call.running_mean is None or again:
        return out
    transformed = where_we_run() is Where.TRANSFORMED
    if options.renorm is not None and not transformed:
        remembered.note(domain, SeenCall(moments[0], before))
    if options.accumulation_steps > 1 and transformed:
        raise NotImplementedError(
            "accumulation_steps in training under vmap, forward mode or export: the micro-batches wait in Python; "
            "use accumulation_steps=1 there, or eval()"
        )
    due = remembered.collect(domain, moments, options)
    if due is not None:
        _move_counted(layer, memory, due)
    return out


def _recalled(layer: Any, domain: int, call: Call) -> Memory | None:
    """The buffers that the first forward of this batch was renormalized against."""
    with torch.no_grad():
        alone = call._replace(weight=None, bias=None, residual=None, running_mean=None, running_var=None, renorm=None)
        _, moments = normalize(alone._replace(form=Form(call.form.eps, slice_size=call.form.slice_size)))
    assert moments is not None  # a training call on a batch that was normalized once
    recalled: Memory | None = layer.running_stats.recall(domain, moments[0])
    return recalled


def _move_counted(layer: Any, memory: Memory, moments: Moments) -> None:
    """Move a domain's buffers; with ``nonfinite="skip"`` count the batches that moved nothing."""
    options, momentum = layer.options, layer.momentum
    mean, var, tracked = memory.running_mean, memory.running_var, memory.num_batches_tracked
    kept_here = options.renorm is not None or options.accumulation_steps > 1
    refusal = COMPILED_INSIDE_CHECKPOINT if kept_here else ""
    if options.nonfinite != "skip":
        move(mean, var, tracked, moments, momentum, False, refusal)
        return
    skipped = layer.get_buffer("num_batches_skipped")
    finite = fused.all_finite(*fused.pooled(*moments)[:2], mean)
    if momentum is None and tracked is not None:  # the average is over the batches that took part
        move(mean, var, tracked - skipped, moments, None, True, refusal)
        tracked.add_(1)
    else:
        move(mean, var, tracked, moments, momentum, True, refusal)
    skipped.add_(~finite)
