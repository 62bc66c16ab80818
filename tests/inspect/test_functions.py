"""Layers, normalizations and dropouts that are called as functions, as a run and a trace read them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm.inspect.folding import foldable
from batchnorm.inspect.from_fx import graph_of_trace
from batchnorm.inspect.from_run import graph_of_run
from batchnorm.inspect.functions import effect_of_function
from batchnorm.inspect.operators import Effect


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias)
        return F.batch_norm(x, self.mean, self.var, training=True)


X = torch.randn(2, 3, 5, 5)
FRONT_ENDS = {"run": lambda model: graph_of_run(model, X, "test"), "fx": graph_of_trace}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_layer_and_a_normalization(front_end):
    model = Functions().eval()
    graph = FRONT_ENDS[front_end](model)
    ((layer, norm),) = graph.directly_normalized()
    assert layer.bias is model.bias
    assert set(layer.tensors) == {"weight", "bias"}
    assert norm.tensors["mean"] is model.mean
    assert norm.by_batch
    assert not list(foldable(graph))
    assert graph.functional_norms == ("",)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("drop", [nn.Dropout2d(0.25), nn.FeatureAlphaDropout(0.25), lambda x: F.dropout(x, 0.25)])
def test_a_dropout(front_end, drop):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.drop, self.beside = drop, nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(self.drop(x)) + self.beside(x)  # the second one reads no dropout

    graph = FRONT_ENDS[front_end](Net())
    (dropout,) = graph.of_effect(Effect.DROPOUT)
    assert dropout.p == 0.25
    assert [norm.name for norm in dropout.first_norms()] == ["norm"]


def test_a_dropout_in_place_is_read_by_all_that_come_after_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            F.dropout(x, 0.5, inplace=True)
            return self.norm(x)

    (dropout,) = FRONT_ENDS["run"](Net()).of_effect(Effect.DROPOUT)
    assert [norm.name for norm in dropout.first_norms()] == ["norm"]


def test_a_weight_that_the_input_makes_is_no_layer():
    class Net(nn.Module):
        def forward(self, x):
            return F.conv2d(x, x.mean((0, 2, 3), keepdim=True).expand(4, 3, 1, 1) * x.sum())

    assert FRONT_ENDS["run"](Net()).of_effect(Effect.LAYER) == []


def test_which_functions():
    assert effect_of_function(batchnorm.functional.batch_norm) is Effect.NORM
    assert effect_of_function(torch.batch_norm) is Effect.NORM
    assert effect_of_function(F.conv_transpose2d) is Effect.LAYER
    assert effect_of_function(F.alpha_dropout) is Effect.DROPOUT
    assert effect_of_function(torch.mm) is Effect.OTHER
    assert effect_of_function(F.relu) is Effect.OTHER
