"""Tensors told apart by their storage: views of one storage are one value."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Key", "key_of", "still_alive"]

# Weak references keep the storages' addresses from being used again, but not their memory.
Key = StorageWeakRef | int


def key_of(tensor: Tensor) -> Key:
    try:
        with torch._C.DisableTorchFunction():  # a function mode would take this for a reading of the model's
            return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, lazy and other tensors without a storage
        return id(tensor)


def still_alive(keys: Iterable[Key]) -> list[Key]:
    """Those whose storage something holds: an object, a container, a closure, an array that shares its memory."""
    alive = [key for key in keys if _alive(key)]
    if alive:
        gc.collect()  # what only a circle of references holds cannot be read again
    return [key for key in alive if _alive(key)]


def _alive(key: Key) -> bool:
    return not isinstance(key, int) and not key.expired()
