"""BatchNorm1d, BatchNorm2d and BatchNorm3d: arguments, buffers and the call; what a call does is in `execution`."""

from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import UserError
from .layer_call import run_layer
from .module_names import full_name
from .opacus_tables import enter_with_opacus
from .options import DEFAULTS, NAMES, Options, make_options, shows_options
from .running_stats import Memory, RunningStats

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormBase", "refuse_scripting"]


class BatchNormBase(nn.modules.batchnorm._BatchNorm):
    """What the three layers add to torch's of the same name.

    The class attributes are the defaults of a layer that was never constructed here: one that was pickled by torch,
    or converted by changing its class. Each option can be read and set as an attribute (``layer.domains``).
    """

    options: Options = DEFAULTS
    domain: int = 0  # whose statistics a call takes that does not say it
    frozen: bool = False
    save_memory: bool = False  # outputs that a backward needs are computed again and not kept (docs/memory.md)
    usual_dims: ClassVar[tuple[int, ...]] = ()  # of an input that need not be looked at by `_check_input_dim`

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "_check_input_dim" in cls.__dict__:  # a subclass that looks by itself
            cls.usual_dims = ()

    @shows_options(*NAMES)
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
        **options: Any,
    ) -> None:
        chosen = make_options(type(self).__name__, options)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:  # torch takes this keyword from 2.12 on only
            self.register_parameter("bias", None)
        self._set_options(chosen)

    def configure(self, **options: Any) -> None:
        """Change options of this layer; those that are not named stay.

        Raises:
            KeywordError: no such option. ValueError: a value that cannot be, or two that cannot be together. The layer
                then stays as it was.
        """
        self._set_options(make_options(type(self).__name__, options, self.options))

    def _set_options(self, options: Options) -> None:
        options.check_layer(self.running_mean is not None, self.weight is not None)
        enter_with_opacus(type(self))
        new_domains = options.domains is not None and options.domains != self.options.domains
        self.options = options
        self.running_stats = RunningStats()
        # torch.fx takes modules of "torch.nn" for leaves, as it must take this one: its mode, buffers and hooks are
        # looked at when the traced program runs. An instance's own attribute says so and leaves the class where it is.
        self.__module__ = "torch.nn"
        if new_domains:
            self._add_domains(options.domains or 1, options.domain_affine)
        if options.nonfinite == "skip" and self.running_mean is not None and "num_batches_skipped" not in self._buffers:
            count = torch.zeros((), dtype=torch.long, device=self.running_mean.device)
            self.register_buffer("num_batches_skipped", count, persistent=False)

    def _add_domains(self, domains: int, domain_affine: bool) -> None:
        """Domain 0 has torch's names; the others lie beside them, so a torch checkpoint still loads."""
        self.domain = 0
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
        if "running_stats" in self.__dict__:  # the constructor of torch's layer resets before there is anything
            self.running_stats.clear()

    def uses_batch_statistics(self) -> bool:
        """Whether this call normalizes by the batch: in training unless frozen, and where there are no buffers."""
        if self.frozen:
            return False
        return self.training or (self.running_mean is None and self.running_var is None)

    def forward(self, input: Tensor, mask: Tensor | None = None, domain: int | Tensor | None = None) -> Tensor:
        """Normalize; see the class.

        Args:
            input: of the class's shape.
            mask: bool, True = a real position; without C, or with 1 there, broadcastable to the input's shape.
            domain: of a layer with ``domains``: an int for the batch, or one a sample (N,).
        """
        return run_layer(self, input, None, mask, domain)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if "running_stats" in state:
            state["running_stats"] = self.running_stats.copy()
        group = self.options.process_group
        if hasattr(group, "group_name"):  # a group is this process's; its name means the same elsewhere
            state["options"] = make_options("", {"process_group": group.group_name}, self.options)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of 0.1 holds the options one by one, and may hold an activation."""
        state = dict(state)
        if state.pop("activation", None):
            raise UserError(
                "this pickle holds a BatchNorm of batchnorm 0.1 with an activation in it, which is a BatchNormAct now; "
                "save the state_dict with 0.1 and load it into the new layer's norm"
            )
        old = {name: state.pop(name) for name in NAMES if name in state}
        super().__setstate__(state)
        if "options" not in state:
            self.options, self.running_stats = make_options("", old), RunningStats()

    @property
    def qconfig(self) -> Any:
        """What `torch.ao.quantization` has given the layer."""
        if "qconfig" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, qconfig: Any) -> None:
        if qconfig is not None:
            say_not_quantized()
        self.__dict__["qconfig"] = qconfig

    @qconfig.deleter
    def qconfig(self) -> None:
        self.__dict__.pop("qconfig", None)

    def __prepare_scriptable__(self) -> Any:
        refuse_scripting(self)

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
        shown = [f"{name}={value}" for name, value in self.options.changed().items()]
        return ", ".join(
            [
                super().extra_repr(),
                *shown,
                *(f"{name}=True" for name in ("frozen", "save_memory") if getattr(self, name)),
            ]
        )


@functools.cache
def say_not_quantized() -> None:
    """Say once, when quantization first gives a layer of ours its settings, that it will not fold or convert it."""
    logging.getLogger("batchnorm").warning(
        "quantization goes by the exact type and leaves our batch normalization in float: right, but neither "
        "folded nor quantized; run batchnorm.revert(model) before it"
    )


def refuse_scripting(module: nn.Module) -> None:
    """Say what to do instead, where TorchScript is about to compile the module."""
    raise UserError(
        f"{full_name(module)}: TorchScript cannot compile this module of batchnorm; script batchnorm.revert(model), "
        "which has the same parameters and computes the same"
    )


def _option(name: str) -> property:
    return property(lambda layer: getattr(layer.options, name), lambda layer, value: layer.configure(**{name: value}))


for _name in NAMES:
    setattr(BatchNormBase, _name, _option(_name))


class BatchNorm1d(BatchNormBase, nn.BatchNorm1d):
    r"""Normalize each channel of (N, C) or (N, C, L) over the batch, then scale and shift it, exactly.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    In training E[x] and Var[x] (biased) are those of the batch, over N and L, and the running statistics move by
    ``running ← (1 − momentum)·running + momentum·batch`` with the *unbiased* variance. In evaluation they are the
    running statistics. A subclass of :class:`torch.nn.BatchNorm1d` that computes the same function: parameters,
    buffers and ``state_dict`` are its, and every tool that goes by the type works on it. An activation or a residual
    after it, in one operator: `BatchNormAct1d`.

    Shape and dtype:
        input and output: (N, C) or (N, C, L), contiguous or channels_last; float32, float64, bfloat16 or float16
        (beside which parameters and buffers may be float32). ``layer(input, mask, domain)``: a mask has the input's
        shape without C.

    Args:
        num_features: C, the number of channels.
        eps: ε, added to the variance.
        momentum: weight of the NEW batch in the running statistics; None: all batches count alike.
        affine: learn γ (``weight``) and β (``bias``).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, learn β as well.
        ghost_batch_size: statistics over slices of this many samples; None: the whole batch.
        renorm: batch renormalization, `Renorm`.
        process_group: None: local statistics; "world" or a ``torch.distributed`` group: synchronized.
        nonfinite: "propagate", or "skip": a batch with NaN or Inf leaves the running statistics as they were and is
            counted in ``num_batches_skipped``.
        feature_axis: the channels' axis; -1 for (N, L, C).
        accumulation_steps: move the running statistics once in so many calls, as one batch of their union would.
        domains: separate running statistics for so many domains; the call's ``domain`` (or `use_domain`) chooses.
        domain_affine: each domain its own weight and bias too.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: at construction, a keyword that cannot be, or two that cannot be together; in the call, an input of
            other dimensions, or a single value for a channel in training.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; docs/variants/ for each keyword's own.
    """

    usual_dims = (2, 3)


class BatchNorm2d(BatchNormBase, nn.BatchNorm2d):
    r"""Normalize each channel of (N, C, H, W) over the batch, then scale and shift it, exactly.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    In training E[x] and Var[x] (biased) are those of the batch, over N, H and W, and the running statistics move by
    ``running ← (1 − momentum)·running + momentum·batch`` with the *unbiased* variance. In evaluation they are the
    running statistics. A subclass of :class:`torch.nn.BatchNorm2d` that computes the same function: parameters,
    buffers and ``state_dict`` are its, and every tool that goes by the type works on it. An activation or a residual
    after it, in one operator: `BatchNormAct2d`.

    Shape and dtype:
        input and output: (N, C, H, W), contiguous or channels_last; float32, float64, bfloat16 or float16
        (beside which parameters and buffers may be float32). ``layer(input, mask, domain)``: a mask has the input's
        shape without C.

    Args:
        num_features: C, the number of channels.
        eps: ε, added to the variance.
        momentum: weight of the NEW batch in the running statistics; None: all batches count alike.
        affine: learn γ (``weight``) and β (``bias``).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, learn β as well.
        ghost_batch_size: statistics over slices of this many samples; None: the whole batch.
        renorm: batch renormalization, `Renorm`.
        process_group: None: local statistics; "world" or a ``torch.distributed`` group: synchronized.
        nonfinite: "propagate", or "skip": a batch with NaN or Inf leaves the running statistics as they were and is
            counted in ``num_batches_skipped``.
        feature_axis: the channels' axis; -1 for (N, H, W, C).
        accumulation_steps: move the running statistics once in so many calls, as one batch of their union would.
        domains: separate running statistics for so many domains; the call's ``domain`` (or `use_domain`) chooses.
        domain_affine: each domain its own weight and bias too.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: at construction, a keyword that cannot be, or two that cannot be together; in the call, an input of
            other dimensions, or a single value for a channel in training.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; docs/variants/ for each keyword's own.
    """

    usual_dims = (4,)


class BatchNorm3d(BatchNormBase, nn.BatchNorm3d):
    r"""Normalize each channel of (N, C, D, H, W) over the batch, then scale and shift it, exactly.

    .. math:: y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \gamma + \beta

    In training E[x] and Var[x] (biased) are those of the batch, over N, D, H and W, and the running statistics move by
    ``running ← (1 − momentum)·running + momentum·batch`` with the *unbiased* variance. In evaluation they are the
    running statistics. A subclass of :class:`torch.nn.BatchNorm3d` that computes the same function: parameters,
    buffers and ``state_dict`` are its, and every tool that goes by the type works on it. An activation or a residual
    after it, in one operator: `BatchNormAct3d`.

    Shape and dtype:
        input and output: (N, C, D, H, W), contiguous or channels_last; float32, float64, bfloat16 or float16
        (beside which parameters and buffers may be float32). ``layer(input, mask, domain)``: a mask has the input's
        shape without C.

    Args:
        num_features: C, the number of channels.
        eps: ε, added to the variance.
        momentum: weight of the NEW batch in the running statistics; None: all batches count alike.
        affine: learn γ (``weight``) and β (``bias``).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device, dtype: of parameters and buffers.
        bias: with ``affine``, learn β as well.
        ghost_batch_size: statistics over slices of this many samples; None: the whole batch.
        renorm: batch renormalization, `Renorm`.
        process_group: None: local statistics; "world" or a ``torch.distributed`` group: synchronized.
        nonfinite: "propagate", or "skip": a batch with NaN or Inf leaves the running statistics as they were and is
            counted in ``num_batches_skipped``.
        feature_axis: the channels' axis; -1 for (N, D, H, W, C).
        accumulation_steps: move the running statistics once in so many calls, as one batch of their union would.
        domains: separate running statistics for so many domains; the call's ``domain`` (or `use_domain`) chooses.
        domain_affine: each domain its own weight and bias too.

    Returns:
        The input's shape and dtype.

    Raises:
        ValueError: at construction, a keyword that cannot be, or two that cannot be together; in the call, an input of
            other dimensions, or a single value for a channel in training.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167; docs/variants/ for each keyword's own.
    """

    usual_dims = (5,)
