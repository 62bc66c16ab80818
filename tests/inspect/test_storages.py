"""One key for all views of a storage, and which storages something still holds."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from batchnorm.inspect.storages import key_of, still_alive


def test_views_have_one_key_and_copies_another():
    x = torch.randn(4, 4)
    assert key_of(x) == key_of(x[1:].t()) == key_of(x.detach())
    assert key_of(x) != key_of(x.clone())
    assert len({key_of(x), key_of(x.view(-1)), key_of(torch.randn(4, 4))}) == 2


def test_a_tensor_without_a_storage_is_its_own_key():
    sparse = torch.eye(3).to_sparse()
    assert key_of(sparse) == id(sparse)
    assert still_alive([key_of(sparse)]) == []


def test_what_is_held_is_alive_and_what_only_a_circle_holds_is_not():
    x, view, gone, array = (torch.randn(3) for _ in range(4))
    circle = SimpleNamespace(x=torch.randn(3))
    circle.itself = circle
    keys = {
        "x": key_of(x),
        "view": key_of(view),
        "gone": key_of(gone),
        "array": key_of(array),
        "circle": key_of(circle.x),
    }
    view, array = view[1:], array.numpy()
    del gone, circle
    alive = still_alive(keys.values())
    assert [name for name, key in keys.items() if key in alive] == ["x", "view", "array"]
    assert (view.shape, array.shape) == ((2,), (3,))


def test_a_key_outlives_its_memory_and_is_used_for_no_other():
    keys = {key_of(torch.randn(100)) for _ in range(50)}
    assert len(keys) == 50
