r"""Turn the description of a call into operators. This module alone chooses an operator or moves a buffer.

Rows: where the call runs. Columns: what is asked. Cells: the operator · who moves the buffers.

============  ==============================  =====================================  ====================  ===========
where         plain statistics                composed source (renorm, synchronized) in place              running
============  ==============================  =====================================  ====================  ===========
eager         forward_update_running_ · it    stats → source → apply · we, after it  forward_inplace_ · it apply
compiling     forward · update_running_once_  the same · update_running_once_        as plain              apply (1)
transformed   F.batch_norm · it (see below)   reference · we, written out            as plain              F.batch_norm
recompute     forward · nobody                stats → source → apply · nobody        as plain              apply
============  ==============================  =====================================  ====================  ===========

- *plain*: the batch's own moments, or each slice's; a mask may select the positions. Without buffers nothing is moved:
  then eager is ``forward`` too.
- *running*: evaluation and frozen layers; nothing is moved. (1) F.batch_norm where Inductor is told to fold it into the
  convolution before it (``freezing``, ``efficient_conv_bn_eval_fx_passes``).
- *transformed*: vmap, jacrev and forward mode have rules for torch's operators alone; an exported or traced program
  runs where this package is not installed. What ``F.batch_norm`` does not have (a mask, slices, a skipped batch, an
  average over all batches) is the reference, which is made of torch's operators, and the update written out. Where
  derivatives nest, the output is the reference's too: torch's derivatives of its batch normalization take the saved
  statistics for constants, so forward over forward and third derivatives are wrong.
- *recompute*: activation checkpointing runs a forward again inside a backward; its batch was counted already. A
  compiled graph cannot know that: the operator ``update_running_once_`` asks when it runs.
- A layer with ``accumulation_steps``, ``renorm`` or ``nonfinite="skip"`` asks for its cell without the update
  (`normalize`); its `RunningStats` say by which moments the buffers move, and `move` moves them.

`plain_training_call` and `plain_running_call` are the cells that small tensors feel most, eager and plain or eager
with running statistics, as one call into C++ where that was built. They take what surely belongs there and leave the
rest to `run`. Layers try them first.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import validation
from .moments import (
    Moments,
    ProcessGroupLike,
    Reference,
    Renorm,
    differentiable_batch_norm,
    flat_mask,
    resolve,
    sourced_batch_norm,
)
from .ops import (
    BatchStatistics,
    FixedStatistics,
    Form,
    InPlaceCall,
    activate,
    fused,
    may_overwrite,
    plain_running_call,
    plain_training_call,
    training_call,
)

__all__ = [
    "Call",
    "Where",
    "channels_second",
    "move",
    "normalize",
    "plain_running_call",
    "plain_training_call",
    "recomputing",
    "run",
    "where_we_run",
]

_apply = torch.ops.batchnorm.apply.default
_update_running_ = torch.ops.batchnorm.update_running_.default
_update_running_once_ = torch.ops.batchnorm.update_running_once_.default
_functorch_level = torch._C._functorch.maybe_current_level
_graph_task = torch._C._current_graph_task_id
_is_tracing = torch._C._is_tracing


class Call(NamedTuple):
    """What is asked of one call, with the channels at axis 1; how it is done is not said here."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    batch_statistics: bool  # else the running ones
    momentum: float | None
    form: Form
    renorm: Renorm | None = None
    process_group: ProcessGroupLike = None
    skip_nonfinite: bool = False
    inplace: bool = False  # a permission


class Where(Enum):
    EAGER = "eager"
    COMPILING = "compiling"
    TRANSFORMED = "transformed"
    RECOMPUTE = "recompute"


def where_we_run() -> Where:
    """The row of the table."""
    if torch.compiler.is_compiling():
        return Where.TRANSFORMED if torch.compiler.is_exporting() else Where.COMPILING
    if _functorch_level() is not None or forward_ad._current_level >= 0 or _is_tracing():
        return Where.TRANSFORMED
    return Where.EAGER if _graph_task() == -1 else Where.RECOMPUTE


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing's second look at a batch already counted.

    Source: https://github.com/pytorch/pytorch/issues/96136.
    """
    return not torch.compiler.is_compiling() and _graph_task() != -1


def run(call: Call) -> Tensor:
    """The call, and the update of its buffers, by the table."""
    # `is_mkldnn` would stay in a compiled graph as one more reader of the input
    if call.input.layout is torch._mkldnn:  # type: ignore[attr-defined]  # torch does not declare it
        return _through_dense(call)
    validation.check_momentum(call.momentum, call.batch_statistics, call.running_mean, call.num_batches_tracked)
    where = where_we_run()
    if where is Where.TRANSFORMED and _torch_has(call):
        out = _through_torch(call)
        return normalize(call)[0] if call.batch_statistics and _derivatives_nest() else out
    composed = call.renorm is not None or call.process_group is not None or call.running_mean is None
    if where is Where.EAGER and call.batch_statistics and not composed and call.input.dim() > 1:
        return _with_update(call)
    out, moments = normalize(call)
    if moments is not None and call.running_mean is not None and not recomputing():
        buffers = (call.running_mean, call.running_var, call.num_batches_tracked)
        move(*buffers, moments, call.momentum, call.skip_nonfinite)
    return out


def _through_dense(call: Call) -> Tensor:
    """oneDNN's layout has no strides that a kernel could follow: a dense copy goes in, and the result goes back."""
    input, residual = call.input.to_dense(), call.residual
    residual = residual if residual is None or residual.layout is torch.strided else residual.to_dense()
    return run(call._replace(input=input, residual=residual)).to_mkldnn()


def _with_update(call: Call) -> Tensor:
    """Eager and plain: one operator for all, also in place."""
    _check(call, synchronized=False)
    vectors = (call.input, call.weight, call.bias)
    buffers = (call.running_mean, call.running_var, call.num_batches_tracked)
    if call.inplace and call.residual is None and call.mask is None and may_overwrite(*vectors, call.form):
        return InPlaceCall.apply(*vectors, buffers, call.momentum, call.skip_nonfinite, call.form)
    real = None if call.mask is None else flat_mask(call.mask, call.input)
    return training_call(*vectors, call.residual, real, *buffers, call.momentum, call.skip_nonfinite, *call.form)


def _check(call: Call, synchronized: bool) -> None:
    input, training = call.input, call.batch_statistics
    validation.check_residual(input, call.residual)
    validation.check_input(input, training, call.form.eps, call.form.slice_size or None, synchronized)
    validation.check_buffers(call.running_mean, call.running_var, training)
    validation.check_vectors(input, call.running_mean, call.running_var, call.weight, call.bias)


def normalize(call: Call) -> tuple[Tensor, Moments | None]:
    """The output, and with batch statistics the (mean, var, count) by which buffers would move; none is moved.

    For callers that keep the statistics in another way than one update a call.
    """
    if call.input.dim() == 1 and not call.input.numel():  # torch takes this: no channel, nothing to do
        return call.input.clone(), None
    group = resolve(call.process_group) if call.batch_statistics else None
    _check(call, synchronized=group is not None)
    real = None if call.mask is None else flat_mask(call.mask, call.input)
    if not call.batch_statistics:
        return _with_running(call, real), None
    tensors = (call.input, call.weight, call.bias, call.residual, real)
    against = None
    if call.renorm is not None:
        if call.running_mean is None or call.running_var is None:
            raise ValueError("renorm corrects toward the running statistics: give running_mean and running_var")
        against = Reference(call.running_mean, call.running_var, call.renorm.bounds(call.num_batches_tracked))
    if where_we_run() is Where.TRANSFORMED:
        return differentiable_batch_norm(*tensors, call.form, group, against)
    if group is None and against is None:
        out, *moments = BatchStatistics.apply(*tensors, *call.form)
        return out, tuple(moments)
    out, moments = sourced_batch_norm(*tensors, call.form, group, against)
    if group is not None and real is None:
        validation.check_shared_count(moments[2])
    return out, moments


def _with_running(call: Call, real: Tensor | None) -> Tensor:
    where = where_we_run()
    if where is Where.TRANSFORMED or (where is Where.COMPILING and _inductor_folds()):
        return _through_torch(call)
    mean, var = call.running_mean, call.running_var
    assert mean is not None  # _check
    assert var is not None
    affine = (call.weight, call.bias, call.residual)
    form = call.form._replace(slice_size=0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (call.input, *affine)):
        return FixedStatistics.apply(call.input, *affine, real, mean, var, *form[:3])
    return _apply(call.input, mean, var, *affine, *form)


def _inductor_folds() -> bool:
    """Whether Inductor is told to fold normalizations into convolutions: it looks for torch's operator alone."""
    from torch._inductor import config  # loaded by whoever compiles

    return bool(config.freezing or config.efficient_conv_bn_eval_fx_passes)


def _torch_has(call: Call) -> bool:
    """Whether torch's operator does what is asked."""
    if not call.batch_statistics:
        return True
    if call.mask is not None or call.form.slice_size or call.renorm is not None or call.process_group is not None:
        return False
    # with momentum=None a factor of 1/num_batches_tracked would have to be read on the host
    return not call.skip_nonfinite and (call.momentum is not None or call.running_mean is None)


def _derivatives_nest() -> bool:
    """Whether torch's own derivative of the call may be differentiated in a way that it is not right for.

    One reverse mode is right, also differentiated again by autograd. A forward mode is not: autograd may stand outside.
    """
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    reverse = sum(one.key() == torch._C._functorch.TransformType.Grad for one in interpreters)
    return forward_ad._current_level >= 0 or reverse > 1


def _through_torch(call: Call) -> Tensor:
    """The plain layer in torch's operators, which every tool knows."""
    validation.check_residual(call.input, call.residual)
    if call.batch_statistics and call.running_mean is not None and call.num_batches_tracked is not None:
        call.num_batches_tracked.add_(1)
    out = F.batch_norm(
        call.input, call.running_mean, call.running_var, call.weight, call.bias, call.batch_statistics,
        call.momentum or 0.0, call.form.eps,
    )  # fmt: skip
    out = out if call.residual is None else out + call.residual
    return activate(out, call.form.activation, call.form.negative_slope)


def move(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    moments: Moments,
    momentum: float | None,
    skip_nonfinite: bool,
    refusal: str = "",
) -> None:
    """Update the buffers in place; `refusal` is what a compiled graph raises where it runs inside a backward."""
    arguments = (running_mean, running_var, num_batches_tracked, *moments, momentum, skip_nonfinite)
    where = where_we_run()
    if where is Where.TRANSFORMED:
        fused.update_running_(*arguments)
    elif where is Where.COMPILING:
        _update_running_once_(*arguments, refusal)
    else:
        _update_running_(*arguments)


def channels_second(
    axis: int, input: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tensors with the channels at axis 1: views, which the kernels read as channels_last without a copy.

    Raises:
        ValueError: the input has no such axis beside its batch's.
    """
    if not -input.dim() <= axis < input.dim() or axis in (0, -input.dim()):
        raise ValueError(f"feature_axis {axis} is no channel axis of an input of shape {tuple(input.shape)}")
    if mask is not None and mask.dim() == input.dim():
        mask = mask.movedim(axis, 1)
    return input.movedim(axis, 1), None if residual is None else residual.movedim(axis, 1), mask
