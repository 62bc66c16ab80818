"""Where the features lie is followed by strides: through views, through operators of one shape, and not further."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.inspect.from_run import graph_of_run
from batchnorm.inspect.operators import Effect

N, L, C = 3, 5, 4
WAYS = {
    "as it is": (lambda x: x, 2),
    "an activation": (torch.relu, 2),
    "transposed": (lambda x: x.transpose(1, 2), 1),
    "permuted and copied": (lambda x: x.permute(0, 2, 1).contiguous() + 1, 1),
    "there and back": (lambda x: x.transpose(1, 2).relu().transpose(1, 2), 2),
    "moved": (lambda x: x.movedim(2, 1), 1),
    "sliced": (lambda x: x[:, 1:4], 2),
    "a sum": (lambda x: x + x.mean(1, keepdim=True), 2),
    "dropout": (lambda x: F.dropout(x, 0.5), 2),
    "in place": (lambda x: x.mul_(2), 2),
    "split in two": (lambda x: x.view(N, L, 2, 2).flatten(1, 2), None),
    "another layer's": (lambda x: torch.ones(N, L, C), None),
}


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.linear = way, nn.Linear(6, C)

    def forward(self, x):
        y = self.way(self.linear(x))
        return F.batch_norm(y, None, None, training=True)


@pytest.mark.parametrize("way", WAYS)
def test_from_a_linear_map_to_a_normalization(way):
    change, axis = WAYS[way]
    graph = graph_of_run(Net(change), torch.randn(N, L, 6), "test")
    (norm,) = graph.of_effect(Effect.NORM)
    assert norm.feature_axis == axis
    assert norm.channel_axis(3) == 1


@pytest.mark.parametrize(
    ("make", "shape", "axis"),
    [
        (lambda: nn.Conv1d(6, C, 1), (N, 6, L), 1),
        (lambda: nn.Embedding(9, C), (N, L), 2),
        (lambda: nn.LayerNorm(C), (N, L, C), 2),
        (lambda: nn.GRU(6, C, batch_first=True), (N, L, 6), 2),
    ],
)
def test_what_sets_the_axis(make, shape, axis):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = make()

        def forward(self, x):
            y = self.first(x)
            return F.batch_norm(y[0] if isinstance(y, tuple) else y, None, None, training=True)

    x = torch.randint(9, shape) if isinstance(make(), nn.Embedding) else torch.randn(shape)
    (norm,) = graph_of_run(First(), x, "test").of_effect(Effect.NORM)
    assert norm.feature_axis == axis
