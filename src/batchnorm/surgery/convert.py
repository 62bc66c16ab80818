"""From torch's batch normalization to ours (`convert`) and back (`revert`), with the same tensors inside."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _LazyNormBase

from ..errors import UserError
from ..layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .foreign import frozen_eps, holds_statistics
from .freeze import frozen_class, is_frozen, thawed_class
from .kinds import is_norm
from .replace import replace_all

__all__ = ["convert", "revert"]


class _AnyBatchNorm(BatchNorm2d):
    """A converted `SyncBatchNorm`, which says not of how many dimensions its input is."""

    def _check_input_dim(self, input: Any) -> None:
        nn.SyncBatchNorm._check_input_dim(self, input)  # type: ignore[arg-type]  # it looks at `input` alone


class _LazyBatchNorm1d(_LazyNormBase, BatchNorm1d):
    cls_to_become = BatchNorm1d


class _LazyBatchNorm2d(_LazyNormBase, BatchNorm2d):
    cls_to_become = BatchNorm2d


class _LazyBatchNorm3d(_LazyNormBase, BatchNorm3d):
    cls_to_become = BatchNorm3d


_OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: _AnyBatchNorm,
}
_LAZY: dict[type, type] = {
    nn.LazyBatchNorm1d: _LazyBatchNorm1d,
    nn.LazyBatchNorm2d: _LazyBatchNorm2d,
    nn.LazyBatchNorm3d: _LazyBatchNorm3d,
}
_TORCHS = {ours: torchs for kinds in (_OURS, _LAZY) for torchs, ours in kinds.items()}
_KEYWORDS = (
    "ghost_batch_size", "renorm", "process_group", "nonfinite", "accumulation_steps", "domains", "domain_affine",
    "inplace",
)  # fmt: skip
_ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}

# Their output is theirs alone until the next module has it, and their own backward needs no more of it.
_SOURCES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


class _Absorbed(nn.Identity):
    """Stands where an activation stood that the batch normalization before it has taken in."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.training = activation.training
        self._activation = (activation,)  # in a tuple: kept for `revert`, not called

    def extra_repr(self) -> str:
        return f"{type(self._activation[0]).__name__} is in the layer before"


def convert(model: nn.Module, **keywords: Any) -> nn.Module:
    """Makes every torch `BatchNorm1d/2d/3d` and `SyncBatchNorm` one of ours, in place; outputs, gradients and
    buffers stay what they were.

    Parameters and buffers are the same objects, so an optimizer goes on; a layer that stands in several places
    does so afterwards; hooks and their handles, mode, dtype and device are kept; a lazy layer becomes a lazy layer of
    ours, a frozen one stays frozen; the `FrozenBatchNorm2d` of torchvision and its copies in other libraries become
    frozen ones of ours, where a trial shows that they compute what ours does. In an
    `nn.Sequential` an activation right after the layer is taken into it, and an `nn.Identity` keeps its place.

    Args:
        model: any module.
        **keywords: `ghost_batch_size`, `renorm`, `process_group`, `nonfinite`, `accumulation_steps`, `domains`,
            `domain_affine`, set on every layer, also on those that were ours already. `inplace=True` is set where a
            layer follows a convolution or linear layer in an `nn.Sequential`: elsewhere others may read its input too;
            False takes it from every layer.

    Returns:
        The same model; a model that is itself a batch normalization is returned anew.

    Raises:
        UserError: an unknown keyword. ValueError: keywords that do not go together, as the layers say it.

    Warns:
        UserWarning: names the batch normalizations of other libraries, which are left alone: their forward may do more.
    """
    unknown = [name for name in keywords if name not in _KEYWORDS]
    if unknown:
        raise UserError(f"convert: unknown keyword {unknown[0]}; it takes {', '.join(_KEYWORDS)}")
    BatchNorm2d(1, **keywords)  # checks the values before anything changes
    inplace = keywords.pop("inplace", None)
    plan, left = _plan_convert(model, keywords)
    done = replace_all(model, plan)
    _convert_lazy(done.root, keywords)
    _absorb_activations(done.root)
    if inplace is not None:
        _set_inplace(done.root, inplace)
    if left:
        warnings.warn(f"convert: left alone, since not torch's own: {', '.join(left)}", stacklevel=2)
    return done.root


def _plan_convert(model: nn.Module, keywords: dict[str, Any]) -> tuple[dict[nn.Module, nn.Module], list[str]]:
    """What each batch normalization becomes, lazy ones aside, and the names of those that are left alone."""
    plan: dict[nn.Module, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        kind = thawed_class(type(module))
        if kind in _OURS:
            plan[module] = _as_ours(module, keywords)
        elif (eps := frozen_eps(module)) is not None:
            plan[module] = _from_buffers(module, eps)
        elif keywords and kind in _TORCHS and kind not in _LAZY.values():
            plan[module] = new = _with_the_same_insides(module, type(module))
            new.configure(**keywords)
        elif (is_norm(module) and kind not in _LAZY and kind not in _TORCHS) or holds_statistics(module):
            left.append(f"{name} ({type(module).__module__}.{type(module).__qualname__})")
    return plan, left


def _convert_lazy(root: nn.Module, keywords: dict[str, Any]) -> None:
    for module in root.modules():
        if type(module) in (*_LAZY, *_LAZY.values()):  # in place: the hooks that give it its size are bound to it
            lazy: Any = module
            lazy.__class__ = _LAZY.get(type(module), type(module))
            lazy.configure(**keywords)


def _as_ours(module: nn.Module, keywords: dict[str, Any]) -> nn.Module:
    ours = _OURS[thawed_class(type(module))]
    if ours is _AnyBatchNorm:
        group = module.process_group
        keywords = {"process_group": "world" if group is None else group, **keywords}
    new = _with_the_same_insides(module, frozen_class(ours) if is_frozen(module) else ours)
    new.configure(**keywords)
    new.frozen = is_frozen(module)
    return new


def _with_the_same_insides(module: nn.Module, kind: Any) -> Any:
    """A `kind` with the module's parameters and buffers, which shares its dicts of hooks: their handles hold on to
    those. A setting that adds a buffer adds it to the new one alone."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        new.__dict__[name] = copy.copy(new.__dict__[name])
    return new


def _from_buffers(module: nn.Module, eps: float) -> nn.Module:
    new: Any = BatchNorm2d(module._buffers["weight"].numel(), eps=eps)  # type: ignore[union-attr]  # frozen_eps saw it
    for name in ("weight", "bias", "num_batches_tracked"):
        delattr(new, name)
    new.register_buffer("num_batches_tracked", None)
    for name, buffer in module._buffers.items():  # γ and β too are buffers there
        new.register_buffer(name, buffer)
    new.training = False
    new.__class__ = frozen_class(BatchNorm2d)
    new.frozen = True
    new.__dict__.update(_before_freezing={}, _mode_asked=False, _converted_from=(module,))
    return new


def _neighbours(root: nn.Module) -> Iterator[tuple[nn.Module, Any, str, Any]]:
    """Yields (holder, module, name, the next one) for modules of which the second surely gets the first's output, and
    the second's name in the holder."""
    for holder in list(root.modules()):
        if type(holder).forward is nn.Sequential.forward:
            children: list[tuple[str, Any]] = [(n, child) for n, child in holder._modules.items() if child is not None]
            for (_, first), (name, second) in pairwise(children):
                yield holder, first, name, second


def _places(root: nn.Module) -> Counter[nn.Module]:
    return Counter(child for holder in root.modules() for child in holder._modules.values() if child is not None)


def _absorb_activations(root: nn.Module) -> None:
    places = _places(root)
    for holder, norm, name, activation in _neighbours(root):
        if _may_absorb(norm, activation, places):
            norm.activation = _ACTIVATIONS[type(activation)]
            norm.negative_slope = getattr(activation, "negative_slope", 0.01)
            holder._modules[name] = _Absorbed(activation)


def _set_inplace(root: nn.Module, inplace: bool) -> None:
    """True not where the layer also stands elsewhere, and not where a hook looks at what is between the two."""
    if not inplace:
        for module in root.modules():
            if thawed_class(type(module)) in _TORCHS:
                cast(Any, module).inplace = False
        return
    places = _places(root)
    for _, source, _, norm in _neighbours(root):
        if thawed_class(type(norm)) in _TORCHS and type(source) in _SOURCES and places[norm] == 1:
            norm.inplace = not (source._forward_hooks or norm._forward_pre_hooks)


def _may_absorb(norm: Any, activation: nn.Module, places: Counter[nn.Module]) -> bool:
    """Not where the layer also stands elsewhere, and not where a hook looks at what is between the two."""
    between = (norm._forward_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    around = (activation._forward_pre_hooks, activation._forward_hooks)
    behind = (activation._backward_hooks, activation._backward_pre_hooks)
    return (
        thawed_class(type(norm)) in _TORCHS
        and norm.activation is None
        and type(activation) in _ACTIVATIONS
        and places[norm] == 1
        and not any((*between, *around, *behind))
    )


def revert(model: nn.Module) -> nn.Module:
    """Makes every layer of ours torch's again, in place, with the same parameter and buffer objects.

    An activation that `convert` took in stands where it stood. A layer that was built with an activation becomes
    `nn.Sequential(norm=BatchNorm2d, activation=ReLU)`, whose `state_dict` keys have `norm.` in them; it can no longer
    be called with a residual or a mask.

    Returns:
        The same model; a model that is itself a batch normalization is returned anew.

    Raises:
        UserError: a layer uses ghost batches, renormalization, domains or another setting that torch has not; the
            model is then unchanged.
    """
    for name, module in model.named_modules():
        if thawed_class(type(module)) in _TORCHS:
            _check_expressible(name, module)
    _give_back_activations(model)
    plan = {m: _as_torchs(m) for m in model.modules() if thawed_class(type(m)) in _OURS.values()}
    done = replace_all(model, plan)
    for module in done.root.modules():
        if type(module) in _LAZY.values():
            module.__class__ = _TORCHS[type(module)]
            _drop_settings(module)
    return done.root


def _check_expressible(name: str, module: Any) -> None:
    for setting in ("ghost_batch_size", "renorm", "nonfinite", "accumulation_steps", "feature_axis", "domains"):
        value = getattr(module, setting)
        if value != getattr(BatchNorm2d, setting):
            raise UserError(
                f"revert: {name or 'the model'} has {setting}={value}, which torch.nn has not; set it to "
                f"{getattr(BatchNorm2d, setting)!r} first (convert takes keywords), or keep the layer"
            )


def _give_back_activations(model: nn.Module) -> None:
    for holder in model.modules():
        children: list[tuple[str, Any]] = list(holder._modules.items())
        for (_, norm), (name, child) in pairwise(children):
            if isinstance(child, _Absorbed) and norm is not None:
                holder._modules[name] = child._activation[0].train(child.training)
                norm.activation = None


def _as_torchs(module: Any) -> nn.Module:
    if "_converted_from" in module.__dict__:
        original: nn.Module = module._converted_from[0]
        return original
    ours, group = thawed_class(type(module)), module.process_group
    torchs = nn.SyncBatchNorm if group is not None else _TORCHS[ours]
    new = _with_the_same_insides(module, frozen_class(torchs) if is_frozen(module) else torchs)
    _drop_settings(new)
    if torchs is nn.SyncBatchNorm:
        new.process_group = None if group == "world" else group
    if module.activation is None:
        return new
    kinds = {word: kind for kind, word in _ACTIVATIONS.items()}
    slope = (module.negative_slope,) if module.activation == "leaky_relu" else ()
    activation = kinds[module.activation](*slope)
    activation.training = module.training
    both = nn.Sequential(OrderedDict(norm=new, activation=activation))
    both.training = module.training  # not by .train(): a frozen layer keeps its own mode
    return both


def _drop_settings(module: nn.Module) -> None:
    module._buffers.pop("num_batches_skipped", None)
    for name in (vars(BatchNorm2d(1)).keys() - vars(nn.BatchNorm2d(1)).keys()) | {"frozen", "domain"}:
        module.__dict__.pop(name, None)
