"""Count the memory of a training step: what the forward leaves for the backward, and the highest sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StepMemory", "StorageCount", "process_peak"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes, each storage counted once; parameters, buffers and the batch are not in it.

    Attributes:
        normalizations: kept after the forward, of tensors that a batch normalization read.
        others: kept after the forward, of all other tensors.
        peak: the highest sum of tensors that lived at once.
    """

    normalizations: int
    others: int
    peak: int

    @property
    def kept(self) -> int:
        return self.normalizations + self.others

    def __str__(self) -> str:
        mega = (f"{value / 1e6:,.1f}" for value in (self.normalizations, self.others, self.peak))
        return "kept by normalizations {} MB, by others {} MB, at the peak {} MB".format(*mega)


class StorageCount(TorchDispatchMode):
    """Sees the storages that operators make, and which of them are alive.

    It holds weak references alone, so it counts whatever keeps a storage: autograd, a list, a C++ object.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}  # by the address of the storage's object
        self._normalized: set[int] = set()
        self.peak = 0
        self.paused = False  # who watches a forward may make tensors of its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("batchnorm::") or ("batch_norm" in name and "backward" not in name):
            self._normalized.update(_address(tensor) for tensor in _tensors(args[:1]))
        for tensor in _tensors(result):
            address = _address(tensor)
            if address not in given and address not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[address] = (StorageWeakRef(storage), storage.nbytes())
                self._normalized.discard(address)  # an earlier storage at this address
        self.peak = max(self.peak, self._count()[0])
        return result

    def _count(self) -> tuple[int, int]:
        """Bytes that live, and those of them that a normalization read."""
        for address in [address for address, (storage, _) in self._alive.items() if storage.expired()]:
            del self._alive[address]
        read = sum(size for address, (_, size) in self._alive.items() if address in self._normalized)
        return sum(size for _, size in self._alive.values()), read

    def memory(self, result: Any) -> StepMemory:
        """What lives now beside the forward's `result`, and the peak until now."""
        for address in {_address(tensor) for tensor in _tensors(result)}:
            self._alive.pop(address, None)
        total, read = self._count()
        return StepMemory(read, total - read, self.peak)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.layout is torch.strided)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def process_peak(device: torch.device) -> int | None:
    """The highest number of bytes that this process has held: in tensors on a GPU, resident on the CPU. None where the
    system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status", encoding="utf-8") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
