"""From torch's batch normalization to ours (`convert`) and back (`revert`), with the same tensors inside."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _LazyNormBase

from ..errors import UserError
from ..inspect.modules import is_norm, is_replaced, unregistered_modules
from ..layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..norm_act import BatchNormActBase
from ..options import DEFAULTS, NAMES, make_options, shows_options
from ..twins import TORCH_TYPES, drop_own, same_insides, torch_twin
from .derived import derived_class, original_class
from .foreign import frozen_eps, holds_statistics
from .foreign_act import ForeignNormAct, is_norm_act
from .freeze import frozen_class, is_frozen, thawed_class
from .fused_sequential import FusedSequential, fuse_sequential_call, unfuse_sequential
from .replace import replace_all

__all__ = ["convert", "revert"]


class _AnyBatchNorm(BatchNorm2d):
    """A converted `SyncBatchNorm`, which says not of how many dimensions its input is."""

    def _check_input_dim(self, input: Any) -> None:
        nn.SyncBatchNorm._check_input_dim(self, input)  # type: ignore[arg-type]  # it looks at `input` alone


class _BufferedBatchNorm2d(BatchNorm2d):
    """A converted `FrozenBatchNorm2d`, whose γ and β are buffers and which may keep no counter."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.num_batches_tracked is None:  # an ordinary checkpoint holds one, and torchvision's layer drops it
            state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _LazyBatchNorm1d(_LazyNormBase, BatchNorm1d):
    cls_to_become = BatchNorm1d


class _LazyBatchNorm2d(_LazyNormBase, BatchNorm2d):
    cls_to_become = BatchNorm2d


class _LazyBatchNorm3d(_LazyNormBase, BatchNorm3d):
    cls_to_become = BatchNorm3d


_OURS: dict[type, type] = {theirs: ours for ours, theirs in TORCH_TYPES.items()} | {nn.SyncBatchNorm: _AnyBatchNorm}
_LAZY: dict[type, type] = {
    nn.LazyBatchNorm1d: _LazyBatchNorm1d,
    nn.LazyBatchNorm2d: _LazyBatchNorm2d,
    nn.LazyBatchNorm3d: _LazyBatchNorm3d,
}
_TORCHS = {ours: torchs for kinds in (_OURS, _LAZY) for torchs, ours in kinds.items()}
_TORCHS[_BufferedBatchNorm2d] = nn.BatchNorm2d


@shows_options(*NAMES)
def convert(
    model: nn.Module,
    *,
    fuse_sequential: bool = True,
    inplace: bool | None = None,
    save_memory: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Make every torch `BatchNorm1d/2d/3d` and `SyncBatchNorm` one of ours, in place.

    Outputs, gradients and buffers stay what they were.

    Parameters and buffers are the same objects, so an optimizer goes on; a layer that stands in several places does so
    afterwards; hooks and their handles, mode, dtype and device are kept; a lazy layer becomes a lazy layer of ours, a
    frozen one stays frozen. The `FrozenBatchNorm2d` of torchvision and its copies in other libraries become frozen ones
    of ours, and subclasses that also activate (timm's `BatchNormAct2d`) keep their class and parts, where a trial shows
    that they compute what ours does. Activations stay where and what they are: an `nn.Sequential` that holds a
    normalization and an activation after it runs the pair as one operator by its own call.

    Args:
        model: any module.
        fuse_sequential: False leaves every `nn.Sequential` the class it has.
        inplace: True lets a normalization's output take its input's place where it follows a convolution or linear
            layer in an `nn.Sequential` (docs/in-place.md): elsewhere others may read its input too. False takes that
            permission back everywhere.
        save_memory: True lets a backward compute outputs again, bit for bit, that other operators would keep for it
            (docs/memory.md). False takes that back everywhere.
        **options: set on every layer, also on those that were ours already.

    Returns:
        The same model; a model that is itself a batch normalization is returned anew.

    Raises:
        UserError: an unknown keyword, or `inplace` without `fuse_sequential`. ValueError: options that do not go
            together, as the layers say it. The model is then unchanged.

    Warns:
        UserWarning: names the batch normalizations that are left alone: another library's whose forward may do more, or
            one whose own `forward` was replaced or compiled, or that a plain list or dict holds.
    """
    make_options("convert", options)  # refused before anything changes
    if inplace and not fuse_sequential:
        raise UserError("convert: inplace works in the call of an nn.Sequential; leave fuse_sequential=True")
    plan, left = _plan_convert(model, options)
    done = replace_all(model, plan)
    _convert_lazy(done.root, options)
    if fuse_sequential:
        _fuse_sequentials(done.root, bool(inplace))
    if inplace is not None:
        _set_inplace(done.root, inplace)
    if save_memory is not None:
        _set_save_memory(done.root, save_memory)
    if left:
        warnings.warn(f"convert: left alone: {', '.join(left)}", stacklevel=2)
    return done.root


def _is_our_norm(module: nn.Module) -> bool:
    """Of one of our classes, lazy, frozen and another library's included; a user's own subclass is not."""
    return thawed_class(type(module)) in _TORCHS or isinstance(module, ForeignNormAct)


def _plan_convert(model: nn.Module, options: dict[str, Any]) -> tuple[dict[nn.Module, nn.Module], list[str]]:
    """What each batch normalization becomes, lazy ones aside, and those that are left alone, with the reason."""
    plan: dict[nn.Module, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        kind = thawed_class(type(module))
        replaced = is_replaced(module)
        if _is_our_norm(module) and kind not in _LAZY.values():
            if options:
                plan[module] = new = same_insides(module, type(module))
                new.configure(**options)
        elif kind in (*_LAZY, *_LAZY.values()):
            continue  # in place, after the others
        elif is_norm(module) and replaced:
            left.append(f"{name} (its forward was replaced or compiled)")
        elif kind in _OURS or is_norm_act(module):
            plan[module] = _as_ours(module, options)
        elif (eps := frozen_eps(module)) is not None and not replaced:
            plan[module] = _from_buffers(module, eps)
        elif is_norm(module) or holds_statistics(module):
            left.append(f"{name} ({type(module).__module__}.{type(module).__qualname__})")
    held = unregistered_modules(model).items()
    left += [f"{name} (not registered as a submodule)" for module, name in held if is_norm(module)]
    return plan, left


def _convert_lazy(root: nn.Module, options: dict[str, Any]) -> None:
    for module in root.modules():
        if type(module) in (*_LAZY, *_LAZY.values()):  # in place: the hooks that give it its size are bound to it
            lazy: Any = module
            lazy.__class__ = _LAZY.get(type(module), type(module))
            lazy.configure(**options)


def _as_ours(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    thawed = thawed_class(type(module))
    ours = _OURS.get(thawed) or derived_class(ForeignNormAct, thawed)
    if isinstance(module, nn.SyncBatchNorm):
        group = module.__dict__["process_group"]
        options = {"process_group": "world" if group is None else group, **options}
    new = same_insides(module, frozen_class(ours) if is_frozen(module) else ours)
    new.__dict__.pop("process_group", None)  # an option now
    new.configure(**options)
    new.frozen = is_frozen(module)
    return new


def _from_buffers(module: nn.Module, eps: float) -> nn.Module:
    new: Any = _BufferedBatchNorm2d(module._buffers["weight"].numel(), eps=eps)  # type: ignore[union-attr]  # frozen_eps saw it
    for name in ("weight", "bias", "num_batches_tracked"):
        delattr(new, name)
    new.register_buffer("num_batches_tracked", None)
    for name, buffer in module._buffers.items():  # γ and β too are buffers there
        new.register_buffer(name, buffer)
    new.training = False
    new.__class__ = frozen_class(_BufferedBatchNorm2d)
    new.frozen = True
    new.__dict__.update(_before_freezing={}, _mode_asked=False, _converted_from=(module,))
    return new


def _fuse_sequentials(root: nn.Module, inplace: bool) -> None:
    for holder in root.modules():
        whole = not is_replaced(holder)
        if whole and getattr(type(holder), "forward", None) is nn.Sequential.forward:  # a ScriptModule's class has none
            fuse_sequential_call(holder, inplace)


def _set_inplace(root: nn.Module, inplace: bool) -> None:
    for holder in root.modules():
        if isinstance(holder, FusedSequential):
            holder.batchnorm_inplace = inplace
        elif isinstance(holder, BatchNormActBase) and not inplace:
            holder.inplace = False


def _set_save_memory(root: nn.Module, save_memory: bool) -> None:
    norms: list[Any] = [module for module in root.modules() if _is_our_norm(module)]
    for norm in norms:
        norm.save_memory = save_memory


def revert(model: nn.Module) -> nn.Module:
    """Make every layer of ours torch's again, in place, with the same parameter and buffer objects.

    Every `nn.Sequential` that `convert` gave a call of its own has its class back, and so has every layer of another
    library. A `BatchNormAct2d` becomes ``nn.Sequential(norm=BatchNorm2d, act=ReLU)``, with the same `state_dict` keys;
    it can no longer be called with a residual or a mask.

    Returns:
        The same model; a model that is itself a batch normalization is returned anew.

    Raises:
        UserError: a layer uses ghost batches, renormalization, domains or another option that torch has not; the model
            is then unchanged.

    Warns:
        UserWarning: names the modules that are left alone, because their own `forward` was replaced or compiled.
    """
    for name, module in model.named_modules():
        if _is_our_norm(module):
            _check_expressible(name, module)
    plan, left = _plan_revert(model)
    done = replace_all(model, plan)
    for composite in plan.values():  # the norms inside them are replaced in their turn
        if isinstance(composite, nn.Sequential):
            replace_all(composite, plan)
    for module in done.root.modules():
        if is_replaced(module):
            continue
        unfuse_sequential(module)
        if type(module) in _LAZY.values():
            module.__class__ = _TORCHS[type(module)]
            drop_own(module)
    if left:
        which = ", ".join(f"{name or 'the model'} (its forward was replaced or compiled)" for name in left)
        warnings.warn(f"revert: left alone: {which}", stacklevel=2)
    return done.root


def _plan_revert(model: nn.Module) -> tuple[dict[nn.Module, nn.Module], list[str]]:
    """What each layer of ours becomes, lazy ones aside, and the names of those that are left alone."""
    plan: dict[nn.Module, nn.Module] = {}
    left: list[str] = []
    for name, module in model.named_modules():
        if _is_ours(module) and is_replaced(module):
            left.append(name)
        elif isinstance(module, BatchNormActBase):
            plan[module] = _as_sequential(module)
        elif _is_our_norm(module) and type(module) not in _LAZY.values():
            plan[module] = _as_torchs(module)
    return plan, left


def _is_ours(module: nn.Module) -> bool:
    return _is_our_norm(module) or isinstance(module, (BatchNormActBase, FusedSequential))


def _check_expressible(name: str, module: Any) -> None:
    for option, value in module.options.changed().items():
        if option != "process_group":  # a SyncBatchNorm has that
            raise UserError(
                f"revert: {name or 'the model'} has {option}={value}, which torch.nn has not; set it to "
                f"{getattr(DEFAULTS, option)!r} first (convert takes keywords), or keep the layer"
            )


def _as_sequential(module: BatchNormActBase) -> nn.Module:
    both: nn.Module = same_insides(module, nn.Sequential)
    both.__dict__["_modules"] = module._modules.copy()
    del both.inplace
    return both


def _as_torchs(module: Any) -> nn.Module:
    if "_converted_from" in module.__dict__:
        original: nn.Module = module._converted_from[0]
        # `.to` and loading with assign=True put other tensors into the layer
        original._buffers.update((name, module._buffers[name]) for name in original._buffers)
        return original
    ours, group = thawed_class(type(module)), module.options.process_group
    torchs = original_class(ours, ForeignNormAct)
    if torchs is ours:
        torchs = nn.SyncBatchNorm if group is not None else _TORCHS[ours]
    new: Any = torch_twin(module, frozen_class(torchs) if is_frozen(module) else torchs)
    if issubclass(torchs, nn.SyncBatchNorm):
        new.process_group = None if group == "world" else group
    return new
