"""An `nn.Sequential` that runs a normalization and the activation after it as one operator, by its own call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layer_call import run_layer
from ..layers import BatchNormBase, refuse_scripting
from ..pairs import known_activation
from ..rebuild import release_saved
from .derived import Derived, derived_class, original_class

__all__ = ["FusedSequential", "fuse_sequential_call", "unfuse_sequential"]

# Their output is theirs alone until the next module has it, and their own backward needs no more of it.
_SOURCES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip
_FORWARD = BatchNormBase.forward
_NOTHING = nn.Identity()


class FusedSequential(Derived):
    """Put before an `nn.Sequential`'s own class. The children, their names and what they are stay as they were; at each
    call they are looked at anew, so that a hook, a slice or another module in their place is respected."""

    batchnorm_inplace: bool = False  # a permission, see docs/in-place.md

    # torch.fx copies annotations into the code that `to_folder` writes, where a name out of this file means nothing.
    def forward(self: Any, input):  # type: ignore[no-untyped-def]
        if isinstance(input, fx.Proxy) or torch.compiler.is_exporting():  # they are to see the children
            return super().forward(input)  # type: ignore[misc]  # nn.Sequential's, further along the MRO
        children = list(self._modules.values())
        position, source, saving = 0, None, False
        while position < len(children):
            child = children[position]
            if getattr(type(child), "forward", None) is not _FORWARD:
                input = child(input)
                if saving:  # what the child saved of an output is known now
                    release_saved(input)
                position, source = position + 1, child
                continue
            inplace = self.batchnorm_inplace and _hands_over(source, child)
            input, taken = _run(child, children[position + 1 : position + 2], input, inplace)
            position, source, saving = position + taken, None, saving or child.save_memory
        return input

    def __prepare_scriptable__(self) -> Any:
        refuse_scripting(self)  # type: ignore[arg-type]  # an nn.Sequential, by its other base


def _run(norm: Any, following: list[Any], input: Tensor, inplace: bool) -> tuple[Tensor, int]:
    """The normalization's result, activated where one operator may do both; and how many modules that was."""
    word = known_activation(following[0], norm) if following else None
    if word is not None:
        return run_layer(norm, input, None, None, None, *word, inplace), 2
    if inplace and known_activation(_NOTHING, norm):
        return run_layer(norm, input, inplace=True), 1
    return norm(input), 1


def _hands_over(source: Any, norm: Any) -> bool:
    """Whether the normalization alone reads the source's output: no hook looks at what is between the two."""
    return type(source) in _SOURCES and not (source._forward_hooks or norm._forward_pre_hooks)


def fuse_sequential_call(holder: Any, inplace: bool) -> None:
    """Make the call of an `nn.Sequential` run pairs as one operator, where it holds any."""
    children = [child for child in holder._modules.values() if child is not None]
    norms = [i for i, child in enumerate(children) if getattr(type(child), "forward", None) is _FORWARD]
    following = [children[i + 1] for i in norms if i + 1 < len(children)]
    kind: Any = type(holder)
    if any(known_activation(child) not in (None, known_activation(_NOTHING)) for child in following) or (
        norms and inplace
    ):
        holder.__class__ = derived_class(FusedSequential, kind)


def unfuse_sequential(holder: Any) -> None:
    """Give an `nn.Sequential` its own class back."""
    if isinstance(holder, FusedSequential):
        holder.__class__ = original_class(type(holder), FusedSequential)
        holder.__dict__.pop("batchnorm_inplace", None)
