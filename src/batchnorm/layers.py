"""Floor 4: BatchNorm1d, BatchNorm2d and BatchNorm3d. Arguments, buffers and the call; the work is `functional`'s."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import has_torch_function

from . import checks
from .bookkeeping import Memory, Seen, kept_forward
from .functional import batch_norm, direct, training_call
from .moments import Moments, ProcessGroupLike, Renorm, check_group
from .whereabouts import where

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _Layer(nn.modules.batchnorm._BatchNorm):
    """What the three layers add to torch's of the same name.

    The class attributes are the defaults of a layer that was never constructed here: one that was pickled by torch,
    or converted by changing its class.
    """

    activation: str | None = None
    negative_slope: float = 0.01
    ghost_batch_size: int | None = None
    renorm: Renorm | None = None
    process_group: ProcessGroupLike = None
    nonfinite: str = "propagate"
    feature_axis: int = 1
    accumulation_steps: int = 1
    domains: int | None = None
    domain: int = 0
    inplace: bool = False
    frozen: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        ghost_batch_size: int | None = None,
        renorm: Renorm | None = None,
        process_group: ProcessGroupLike = None,
        nonfinite: str = "propagate",
        feature_axis: int = 1,
        accumulation_steps: int = 1,
        domains: int | None = None,
        domain_affine: bool = False,
        inplace: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:  # torch takes this keyword from 2.12 on only
            self.register_parameter("bias", None)
        self.configure(
            activation=activation, negative_slope=negative_slope, ghost_batch_size=ghost_batch_size, renorm=renorm,
            process_group=process_group, nonfinite=nonfinite, feature_axis=feature_axis,
            accumulation_steps=accumulation_steps, domains=domains, domain_affine=domain_affine, inplace=inplace,
        )  # fmt: skip

    def configure(self, *, domains: int | None = None, domain_affine: bool = False, **keywords: Any) -> None:
        """Check the keywords of this class and set them: the constructor's second half, also for converted layers.

        Raises:
            ValueError: a keyword that cannot be, or two that cannot be together; the layer stays as it was.
        """
        unknown = set(keywords) - set(_KEYWORDS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no keyword {', '.join(sorted(unknown))}")
        merged = {name: keywords.get(name, getattr(self, name)) for name in _KEYWORDS}
        _check_together(self, merged, domains, domain_affine)
        for name, value in merged.items():
            setattr(self, name, value)
        # by domain: moments of micro-batches that wait for their union; statistics the last renormalised call saw
        self._pending: dict[int, list[Moments]] = {}
        self._before: dict[int, deque[Seen]] = {}
        if domains is not None:
            self._add_domains(domains, domain_affine)
        if self.nonfinite == "skip" and self.running_mean is not None and "num_batches_skipped" not in self._buffers:
            count = torch.zeros((), dtype=torch.long, device=self.running_mean.device)
            self.register_buffer("num_batches_skipped", count, persistent=False)

    def _add_domains(self, domains: int, domain_affine: bool) -> None:
        """Domain 0 has torch's names; the others lie beside them, so a torch checkpoint still loads."""
        self.domains, self.domain = domains, 0
        for name, source in (*self._buffers.items(), *(self._parameters.items() if domain_affine else ())):
            if source is None or name.startswith("domain_") or name == "num_batches_skipped":
                continue
            rows = source.detach().unsqueeze(0).repeat(domains - 1, *(1,) * source.dim())
            if isinstance(source, nn.Parameter):
                self.register_parameter(f"domain_{name}", nn.Parameter(rows))
            else:
                self.register_buffer(f"domain_{name}", rows)

    def memory(self, domain: int = 0) -> Memory:
        """The buffers and affine parameters of a domain; views, so that updates reach the layer."""
        if domain == 0:
            return Memory(self.running_mean, self.running_var, self.num_batches_tracked, self.weight, self.bias)
        mean, var, tracked, weight, bias = (self._row(name, domain) for name in Memory._fields)
        return Memory(
            mean, var, tracked, self.weight if weight is None else weight, self.bias if bias is None else bias
        )

    def _row(self, name: str, domain: int) -> Tensor | None:
        rows = getattr(self, f"domain_{name}", None)
        return None if rows is None else rows[domain - 1]

    def reset_running_stats(self) -> None:
        """Statistics of every domain to 0 and 1, counters to 0; micro-batches that wait for their union are let go."""
        super().reset_running_stats()
        if self.track_running_stats:
            for name in ("domain_running_mean", "domain_num_batches_tracked", "num_batches_skipped"):
                if name in self._buffers:
                    self.get_buffer(name).zero_()
            if "domain_running_var" in self._buffers:
                self.get_buffer("domain_running_var").fill_(1)
        self._forget()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, value in (("domain_weight", 1.0), ("domain_bias", 0.0)):
            if self._parameters.get(name) is not None:
                nn.init.constant_(self.get_parameter(name), value)

    def _forget(self) -> None:
        for kept in ("_pending", "_before"):
            if kept in self.__dict__:  # the constructor of torch's layer resets before there is anything
                getattr(self, kept).clear()

    def uses_batch_statistics(self) -> bool:
        """Whether this call normalises by the batch: in training unless frozen, and where there are no buffers."""
        if self.frozen:
            return False
        return self.training or (self.running_mean is None and self.running_var is None)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        domain: int | Tensor | None = None,
    ) -> Tensor:
        """``activation(batch_norm(input) + residual)``; see `batchnorm.functional.batch_norm`.

        `domain` chooses the statistics of a layer with ``domains``: an int for the batch, or one a sample (N,).
        """
        if not isinstance(cast(object, input), fx.Proxy):  # under symbolic tracing there is no shape to look at
            self._check_input_dim(input)
        if self.process_group is None:
            return self._call(input, residual, mask, domain)
        try:
            return self._call(input, residual, mask, domain)
        except RuntimeError as error:  # of all ranks one fails first: say in which layer
            raise RuntimeError(f"{where(self)}: synchronised batch norm failed: {error}") from error

    def _call(self, input: Tensor, residual: Tensor | None, mask: Tensor | None, domain: int | Tensor | None) -> Tensor:
        if (
            domain is not None
            or self.domains is not None
            or self.accumulation_steps > 1
            or (self.training and (self.renorm is not None or self.nonfinite == "skip"))
        ):
            return kept_forward(self, input, residual, mask, domain)
        if self.training and mask is None and self.process_group is None and self.feature_axis == 1 and direct():
            held = self._held()
            if held is not None and not has_torch_function((input, residual, *held)) and input.dim() > 1:
                return self._at_once(input, residual, *held)
        # read once: each look at a buffer or parameter is a search through nn.Module's dictionaries
        mean, var, weight, bias, frozen = self.running_mean, self.running_var, self.weight, self.bias, self.frozen
        training = not frozen and (self.training or (mean is None and var is None))
        keep = self.track_running_stats or not self.training or frozen
        tracked = self.num_batches_tracked if training and keep else None
        return batch_norm(
            input,
            mean if keep else None,
            var if keep else None,
            weight,
            bias,
            training,
            self.momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
            ghost_batch_size=self.ghost_batch_size,
            process_group=self.process_group,
            feature_axis=self.feature_axis,
            negative_slope=self.negative_slope,
            num_batches_tracked=tracked,
            inplace=self._may_overwrite(),
        )

    def _held(self) -> tuple[Tensor | None, ...] | None:
        """What a training call that moves the buffers reads and writes; None where it moves none.

        Straight from nn.Module's dictionaries: its look-up of five names costs half of what the operator does. None too
        where one lies elsewhere (pruned, parametrised).
        """
        buffers, parameters = self._buffers, self._parameters
        if self.frozen or not self.track_running_stats or buffers.get("num_batches_tracked") is None:
            return None
        try:
            return (
                buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"],
                parameters["weight"], parameters["bias"],
            )  # fmt: skip
        except KeyError:
            return None

    def _at_once(
        self,
        input: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        tracked: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """What `batch_norm` would come to: small tensors feel every call in between."""
        checks.check_residual(input, residual)
        form = (self.eps, self.activation or "", self.negative_slope, self.ghost_batch_size or 0)
        buffers = (mean, var, tracked)
        return training_call(
            input, weight, bias, residual, None, buffers, self.momentum, False, form, self._may_overwrite()
        )

    def _may_overwrite(self) -> bool:
        """Not where a hook looks at the call afterwards: it is to find the input."""
        return self.inplace and not self._forward_hooks and not nn.modules.module._global_forward_hooks

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_before"] = {}  # serves a backward of this object's own forward, never a copy's
        if hasattr(self.process_group, "group_name"):  # a group is this process's; its name means the same elsewhere
            state["process_group"] = self.process_group.group_name
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in list(self._buffers) + list(self._parameters):
            if not name.startswith("domain_") or prefix + name in state_dict:
                continue
            base = state_dict.get(prefix + name.removeprefix("domain_"))
            if base is not None:  # a checkpoint without domains: each begins where it was
                rows = getattr(self, name)
                state_dict[prefix + name] = base.unsqueeze(0).expand(rows.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._forget()  # what waited belongs to the statistics that were replaced

    def extra_repr(self) -> str:
        defaults = _Layer.__dict__
        shown = [name for name in (*_KEYWORDS, "domains", "frozen") if getattr(self, name) != defaults[name]]
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)}" for name in shown)])


_KEYWORDS = (
    "activation",
    "negative_slope",
    "ghost_batch_size",
    "renorm",
    "process_group",
    "nonfinite",
    "feature_axis",
    "accumulation_steps",
    "inplace",
)


def _check_together(layer: _Layer, keywords: dict[str, Any], domains: int | None, domain_affine: bool) -> None:
    checks.check_words(keywords["activation"], keywords["nonfinite"])
    checks.check_ghost_batch_size(keywords["ghost_batch_size"])
    check_group(keywords["process_group"])
    tracked = layer.running_mean is not None
    renorm, steps = keywords["renorm"], keywords["accumulation_steps"]
    if renorm is not None and not isinstance(renorm, Renorm):
        raise ValueError(f"renorm must be None or batchnorm.Renorm(r_max, d_max), got {renorm!r}")
    if renorm is not None and not tracked:
        raise ValueError("renorm corrects towards the running statistics: it needs track_running_stats=True")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"accumulation_steps must be a positive number of micro-batches, got {steps!r}")
    if steps > 1 and not tracked:
        raise ValueError("accumulation_steps moves the running statistics: it needs track_running_stats=True")
    if keywords["feature_axis"] == 0:
        raise ValueError("feature_axis 0 is the batch's axis; channels are at 1, or at -1 for (N, L, C)")
    if domains is not None and (not isinstance(domains, int) or domains < 2):
        raise ValueError(f"domains must be None or at least 2, got {domains!r}")
    if domain_affine and (domains is None or layer.weight is None):
        raise ValueError("domain_affine gives each domain its own weight and bias: it needs domains= and affine=True")


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    pass


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    pass


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    pass


_DOC = r"""{torch} over {shape}, exactly and in one pass, with the activation and the residual in it.

    .. math:: y = \mathrm{{activation}}\left(\frac{{x - \mathrm{{E}}[x]}}{{\sqrt{{\mathrm{{Var}}[x] + \epsilon}}}}
        \gamma + \beta + \mathrm{{residual}}\right)

    A drop-in for :class:`torch.nn.{name}`, of which it is a subclass: the same positional arguments, parameters,
    buffers and ``state_dict``. ``momentum`` is the weight of the NEW batch; the buffers keep the unbiased variance.

    Args:
        num_features: C, the size of the channel axis.
        eps, momentum, affine, track_running_stats, device, dtype, bias: as torch's.
        activation: None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh"; after the residual.
        negative_slope: of "leaky_relu".
        ghost_batch_size: statistics over slices of this many samples; None = the whole batch.
        renorm: batch renormalization, `Renorm`.
        process_group: None = local statistics; "world" or a ``torch.distributed`` group = synchronised.
        nonfinite: "propagate", or "skip": a batch with NaN or Inf leaves the running statistics as they were; it
            counts in ``num_batches_tracked``, and in ``num_batches_skipped`` apart.
        feature_axis: the channels' axis, -1 for (N, L, C).
        accumulation_steps: move the running statistics once in so many calls, as one batch of their union would.
        domains: separate statistics for so many domains; the call's ``domain`` (or `use_domain`) chooses.
        domain_affine: each domain its own weight and bias too.
        inplace: the output may take the input's place in eager training, see `batchnorm.functional.batch_norm`.

    Shape:
        input, residual and output: {shape}; mask: without C, or with 1 there.

    Raises:
        ValueError: at construction, keywords that cannot be (together); in the call, an input of other dimensions,
            or one value a channel in training.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; docs/variants/ for each keyword's own.
    """

for _class, _shape in (
    (BatchNorm1d, "(N, C) or (N, C, L)"),
    (BatchNorm2d, "(N, C, H, W)"),
    (BatchNorm3d, "(N, C, D, H, W)"),
):
    _class.__doc__ = _DOC.format(name=_class.__name__, torch="Batch normalization", shape=_shape)
