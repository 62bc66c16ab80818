"""The one walker: replaces modules wherever a model holds them.

A module that stands in several places is replaced once, by one object, in all of them. Python attributes
that are not registered as submodules (a tuple of blocks kept beside them, say) are followed one level deep,
because a forward that walks such a tuple would otherwise go on calling what was taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UserError

__all__ = ["Replaced", "replace", "replace_all"]

Policy = Callable[[str, nn.Module], "nn.Module | None"]


@dataclass
class Replaced:
    """What a replacement did: the root afterwards, `{old: new}`, and the way back (`undo`)."""

    root: nn.Module
    modules: dict[nn.Module, nn.Module] = field(default_factory=dict)
    _restore: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put every module back where it was."""
        while self._restore:
            self._restore.pop()()


def replace(model: nn.Module, policy: Policy) -> Replaced:
    """Ask `policy(name, module)` once for each module; what it returns takes the module's places.

    `policy` is asked about all modules before the first one is replaced, so that it may raise and leave
    the model as it was. Modules inside a replaced one are not asked about: they belong to the replacement.
    """
    plan: dict[nn.Module, nn.Module] = {}
    _collect(model, "", policy, plan, set())
    return replace_all(model, plan)


def _collect(
    module: nn.Module, name: str, policy: Policy, plan: dict[nn.Module, nn.Module], seen: set[nn.Module]
) -> None:
    if module in seen:
        return
    seen.add(module)
    new = policy(name, module)
    if new is not None and new is not module:
        plan[module] = new
        return
    for child_name, child in module.named_children():
        _collect(child, f"{name}.{child_name}" if name else child_name, policy, plan, seen)


def replace_all(model: nn.Module, plan: dict[nn.Module, nn.Module]) -> Replaced:
    """Replace each key of `plan` by its value in all its places; a root among them is returned anew."""
    done = Replaced(plan.get(model, model), plan)
    if not plan:
        return done
    holders = list(model.modules())
    for holder in holders:
        if isinstance(holder, torch.jit.ScriptModule) and any(part in plan for part in holder.modules()):
            raise UserError(
                f"{type(holder).__name__} is a TorchScript module, whose parts cannot be replaced; "
                "change the Python model it was made from and script that"
            )
    for holder in holders:
        # A replaced module keeps its own parts, and so does a compiled one, where nothing is to be replaced.
        if holder not in plan and not isinstance(holder, torch.jit.ScriptModule):
            _replace_in(holder, done)
    return done


def _replace_in(holder: nn.Module, done: Replaced) -> None:
    plan = done.modules
    for places in (holder._modules, holder.__dict__):
        for name, value in list(places.items()):
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            if isinstance(value, nn.Module):
                new: Any = plan.get(value, value)
            else:
                new = _in_container(value, plan)
            if new is not value:
                _set(places, name, new, done)


def _in_container(value: Any, plan: dict[nn.Module, nn.Module]) -> Any:
    """A list, tuple or dict of modules with the replacements in it; the same object where none is in it."""

    def changed(items: Iterator[Any]) -> bool:
        return any(isinstance(item, nn.Module) and item in plan for item in items)

    def swap(item: Any) -> Any:
        return plan.get(item, item) if isinstance(item, nn.Module) else item

    if type(value) in (list, tuple) and changed(iter(value)):
        return type(value)(swap(item) for item in value)
    if type(value) is dict and changed(iter(value.values())):
        return {key: swap(item) for key, item in value.items()}
    return value


def _set(places: dict[str, Any], name: str, new: Any, done: Replaced) -> None:
    old = places[name]
    places[name] = new
    done._restore.append(lambda: places.__setitem__(name, old))
