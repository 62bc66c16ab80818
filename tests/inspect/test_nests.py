"""Batches of every form: their tensors are found, copied, moved and counted, and what cannot be is refused."""

from __future__ import annotations

import threading
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import recalibrate
from batchnorm.errors import UserError
from batchnorm.inspect.nests import arguments_of, copied, mapped, moved, samples_in, tensors_in

Pair = namedtuple("Pair", "image label")


class Encoding(UserDict):
    """As transformers' BatchEncoding: moves in place, and returns itself."""

    def to(self, device: Any) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    names: list[str] = field(default_factory=list)


class Slots:
    __slots__ = ("names", "x")

    def __init__(self, x: Tensor) -> None:
        self.x, self.names = x, "a"


class ListOf(list):  # type: ignore[type-arg]  # pytree does not know it
    pass


class Store(MutableMapping):  # type: ignore[type-arg]  # as PyG's storage, which is no dict
    def __init__(self, **values: Any) -> None:
        self.values_held = values

    def __getitem__(self, key: str) -> Any:
        return self.values_held[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.values_held[key] = value

    def __delitem__(self, key: str) -> None:
        del self.values_held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_held)

    def __len__(self) -> int:
        return len(self.values_held)


class Graphs:
    """As a batch of PyG: attributes live in a store, and it counts its graphs."""

    def __init__(self, x: Tensor) -> None:
        self._store = Store(x=x, edges=torch.zeros(2, 9))
        self.num_graphs = 3

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._store[name]

    def to(self, device: Any) -> Graphs:
        self._store["x"] = self._store["x"].to(device)
        return self


class Sub(Tensor):
    pass


def packed(x: Tensor) -> Any:
    return nn.utils.rnn.pack_padded_sequence(x.unsqueeze(1).expand(-1, 3, -1), torch.tensor([3, 2, 2, 1, 1]), True)


X = torch.randn(5, 2)
NESTS = {
    "tensor": (lambda x: x, 5),
    "subclass": (lambda x: x.as_subclass(Sub), 5),
    "nested tensor": (lambda x: torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged), 2),
    "pair": (lambda x: (x, torch.zeros(7)), 5),
    "scalar first": (lambda x: {"temperature": torch.tensor(2.0), "x": x}, 5),
    "dict": (lambda x: {"x": x}, 5),
    "OrderedDict": (lambda x: OrderedDict(x=x), 5),
    "UserDict": (lambda x: UserDict(x=x), 5),
    "BatchEncoding": (lambda x: Encoding(x=x), 5),
    "namedtuple": (lambda x: Pair(x, [1]), 5),
    "dataclass": (lambda x: Frozen(x), 5),
    "slots": (lambda x: Slots(x), 5),
    "namespace": (lambda x: SimpleNamespace(inner=SimpleNamespace(x=x)), 5),
    "list subclass": (lambda x: ListOf([x]), 5),
    "deque": (lambda x: deque([x]), 5),
    "nested lists": (lambda x: [[x, [x]], x], 5),
    "tuple of tuples": (lambda x: ((x, x), (x,)), 5),
    "packed": (packed, 5),
    "packed in a dict": (lambda x: {"x": packed(x)}, 5),
    "graphs": (Graphs, 3),
    "empty": (lambda x: x[:0], 0),
    "array": (lambda x: x.numpy(), 5),
    "array in a dict": (lambda x: {"x": x.numpy()}, 5),
    "with a lock": (lambda x: {"x": x, "lock": threading.Lock()}, 5),
    "with an object that holds a lock": (lambda x: (x, SimpleNamespace(lock=threading.Lock())), 5),
}


def data_in(nest: Any) -> list[Any]:
    return tensors_in(nest) or [nest["x"] if isinstance(nest, dict) else nest]


@pytest.mark.parametrize("kind", NESTS)
def test_a_copy_has_the_same_form_and_other_memory(kind):
    make, count = NESTS[kind]
    nest = make(X.clone())
    assert samples_in(nest) == count
    other = copied(nest)
    assert type(other) is type(nest)
    before, after = data_in(nest), data_in(other)
    assert len(before) == len(after) > 0
    for a, b in zip(before, after, strict=True):
        assert type(a) is type(b)
        a, b = (t.values() if isinstance(t, Tensor) and t.is_nested else t for t in (a, b))
        same = torch.equal if isinstance(a, Tensor) else np.array_equal
        assert same(a, b)
        b.copy_(b + 1) if isinstance(b, Tensor) else b.fill(7)
        assert not count or not same(a, b)
        b.copy_(a) if isinstance(b, Tensor) else None  # one tensor may stand in several places


@pytest.mark.parametrize("kind", NESTS)
def test_it_is_moved_by_its_own_way(kind):
    nest = copied(NESTS[kind][0](X))
    for tensor in tensors_in(moved(nest, torch.device("meta"))):
        on_cpu = kind.startswith("packed") and tensor.dtype == torch.int64  # batch_sizes has to stay there
        on_cpu |= kind == "graphs" and tensor.shape == (2, 9)  # its own `to` says so
        assert (tensor.device.type == "cpu") == on_cpu
    assert moved(X, None) is X
    assert moved(X, torch.device("cpu")) is X


def test_what_holds_no_data_is_shared_and_one_tensor_stays_one():
    lock = threading.Lock()
    nest = {"a": X, "b": [X], "lock": SimpleNamespace(lock=lock)}
    other = copied(nest)
    assert other["lock"] is nest["lock"]
    assert other["a"] is other["b"][0]
    assert other["a"] is not X
    assert not copied(X.clone().requires_grad_() * 2).requires_grad
    assert torch.equal(mapped(lambda t: t + 1, Frozen(X)).x, X + 1)


def test_the_arguments_of_an_example():
    assert arguments_of((1, 2)) == ((1, 2), {})
    assert arguments_of(UserDict(x=1)) == ((), {"x": 1})
    assert arguments_of({1: 2}) == (({1: 2},), {})
    sequence = packed(X)
    assert arguments_of(sequence)[0][0] is sequence


class Reads(nn.Module):
    """Takes `x` out of whatever it is called with; writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = batchnorm.BatchNorm1d(2)

    def forward(self, input: Any = None, **named: Any) -> Tensor:
        values = tensors_in(named or input)
        x = torch.from_numpy(named["x"] if named else input) if not values else max(values, key=Tensor.dim)
        x = (x.values() if x.is_nested else x).reshape(-1, 2)
        y = self.norm(x)
        x.zero_()
        return y


@pytest.mark.parametrize("kind", [kind for kind in NESTS if kind not in ("empty", "packed in a dict")])
def test_recalibrate_counts_and_never_changes_the_batches(kind):
    make, count = NESTS[kind]
    batches = [make(X.clone()) for _ in range(3)]
    model = Reads()
    before = model.norm.running_mean.clone()
    result = recalibrate(model, batches, samples=2 * count)
    assert (result.samples, result.batches) == (2 * count, 2)
    assert not torch.equal(model.norm.running_mean, before)
    again = Reads()
    recalibrate(again, batches, samples=2 * count)
    torch.testing.assert_close(again.norm.running_mean, model.norm.running_mean)


def test_an_empty_batch_adds_nothing():
    full, mixed = Reads(), Reads()
    recalibrate(full, [X])
    result = recalibrate(mixed, [X, X[:0]])
    assert (result.samples, result.batches) == (5, 2)
    torch.testing.assert_close(mixed.norm.running_var, full.norm.running_var)


class Texts:
    pass


@pytest.mark.parametrize("batch", [Texts(), ["a text", "another"], 3])
def test_what_holds_no_tensor_is_refused_by_its_type(batch):
    with pytest.raises(UserError, match=r"a (Texts|str|int) without a tensor .* forward="):
        recalibrate(Reads(), [batch])
    result = recalibrate(Reads(), [batch], forward=lambda model, batch: model(X.clone()))
    assert result.samples == 1
    with pytest.raises(UserError, match="cannot be told"):
        recalibrate(Reads(), [batch], forward=lambda model, batch: model(X.clone()), samples=5)


def test_what_cannot_be_copied_is_refused_in_one_line():
    class Stubborn(SimpleNamespace):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("not\nso")

    for batch in (Stubborn(x=X), MappingProxyType({"x": X})):
        with pytest.raises(UserError, match=rf"batch 0 is a {type(batch).__name__} that cannot be copied") as caught:
            recalibrate(Reads(), [batch])
        assert "\n" not in str(caught.value)
