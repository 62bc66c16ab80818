"""The keywords that our layers have beyond torch's: names, defaults and refusals, each written here alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from .errors import KeywordError
from .moments import ProcessGroupLike, Renorm, check_group

__all__ = ["CALL_OPTIONS", "DEFAULTS", "NAMES", "Options", "make_options", "shows_options"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Options:
    """Where a layer's moments come from, and how its running statistics move.

    Raises:
        ValueError: a value that cannot be, or two that cannot be together.
    """

    ghost_batch_size: int | None = None  # statistics over slices of this many samples; None: the whole batch
    renorm: Renorm | None = None  # batch renormalization
    process_group: ProcessGroupLike = None  # None: local statistics; "world" or a group: synchronized
    nonfinite: str = "propagate"  # or "skip": a batch with NaN or Inf leaves the running statistics as they were
    feature_axis: int = 1  # the channels' axis; -1 for (N, L, C)
    accumulation_steps: int = 1  # one update of the running statistics for so many calls
    domains: int | None = None  # separate running statistics for so many domains
    domain_affine: bool = False  # weight and bias for each domain too

    # Whether a training call takes the statistics of its own batch or slices and updates the buffers once.
    plain: bool = field(init=False, repr=False, compare=False)
    # Whether the layer's `RunningStats` decide when and by which moments the buffers move.
    remembers: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_values(self)
        check_group(self.process_group)
        if self.domain_affine and self.domains is None:
            raise ValueError(
                "domain_affine gives each domain its own weight and bias: it needs domains= and affine=True"
            )
        remembers = self.renorm is not None or self.nonfinite == "skip" or self.accumulation_steps > 1
        elsewhere = self.process_group is not None or self.domains is not None or self.feature_axis != 1
        object.__setattr__(self, "remembers", remembers)
        object.__setattr__(self, "plain", not (remembers or elsewhere))

    def check_layer(self, tracked: bool, affine: bool) -> None:
        """Refuse what a layer without running statistics, or without weight and bias, cannot do."""
        if self.renorm is not None and not tracked:
            raise ValueError("renorm corrects toward the running statistics: it needs track_running_stats=True")
        if self.accumulation_steps > 1 and not tracked:
            raise ValueError("accumulation_steps moves the running statistics: it needs track_running_stats=True")
        if self.domain_affine and not affine:
            raise ValueError(
                "domain_affine gives each domain its own weight and bias: it needs domains= and affine=True"
            )

    def changed(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        return {name: value for name in NAMES if (value := getattr(self, name)) != getattr(DEFAULTS, name)}


def _check_values(options: Options) -> None:
    check_ghost_batch_size(options.ghost_batch_size)
    steps, domains = options.accumulation_steps, options.domains
    if options.renorm is not None and not isinstance(options.renorm, Renorm):
        raise ValueError(f"renorm must be None or batchnorm.Renorm(r_max, d_max), got {options.renorm!r}")
    if options.nonfinite not in ("propagate", "skip"):
        raise ValueError(f"nonfinite must be 'propagate' or 'skip', got {options.nonfinite!r}")
    if not isinstance(options.feature_axis, int) or options.feature_axis == 0:
        raise ValueError(
            f"feature_axis must be a channel axis, 1 or -1 for (N, L, C); axis 0 is the batch's; "
            f"got {options.feature_axis!r}"
        )
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"accumulation_steps must be a positive number of micro-batches, got {steps!r}")
    if domains is not None and (not isinstance(domains, int) or domains < 2):
        raise ValueError(f"domains must be None or at least 2, got {domains!r}")


def check_ghost_batch_size(ghost_batch_size: int | None) -> None:
    if ghost_batch_size is not None and (not isinstance(ghost_batch_size, int) or ghost_batch_size < 1):
        raise ValueError(f"ghost_batch_size must be None or a positive number of samples, got {ghost_batch_size!r}")


DEFAULTS = Options()
NAMES = tuple(option.name for option in fields(Options) if option.init)
# What a function can be asked for that keeps nothing between its calls.
CALL_OPTIONS = ("ghost_batch_size", "renorm", "process_group", "nonfinite", "feature_axis")
# What belongs to the composite of a normalization and an activation.
_COMPOSITE = ("activation", "negative_slope", "residual", "inplace")


def make_options(
    owner: str, given: Mapping[str, Any], base: Options = DEFAULTS, allowed: Iterable[str] = NAMES
) -> Options:
    """`base` with the given keywords.

    Raises:
        KeywordError: a keyword that `owner` does not take. ValueError: see `Options`.
    """
    if not given:
        return base
    allowed = tuple(allowed)
    for name in given:
        if name not in allowed:
            raise KeywordError(_unknown(owner, name, allowed))
    return replace(base, **given)


def _unknown(owner: str, name: str, allowed: tuple[str, ...]) -> str:
    if name not in _COMPOSITE or owner.startswith("BatchNormAct"):
        return f"{owner} has no keyword {name}; it takes {', '.join(allowed)}"
    if owner in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        composite = f"batchnorm.BatchNormAct{owner.removeprefix('BatchNorm')}"
        return f"{owner} takes no {name}: it normalizes and does nothing else; use {composite}, which activates too"
    return (
        f"{owner} takes no {name}: a BatchNorm normalizes and does nothing else; build that layer as a "
        "batchnorm.BatchNormAct2d, or put the activation's module after it"
    )


def shows_options(*names: str) -> Callable[[_Function], _Function]:
    """Write the options' names and defaults into the signature of a function that takes them as ``**options``."""

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        kinds = inspect.Parameter
        own = [p for p in signature.parameters.values() if p.kind is not kinds.VAR_KEYWORD]
        options = [
            kinds(option.name, kinds.KEYWORD_ONLY, default=option.default, annotation=option.type)
            for option in fields(Options)
            if option.name in names
        ]
        function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]  # inspect reads it
        return function

    return decorate
