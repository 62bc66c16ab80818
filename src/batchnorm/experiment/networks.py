"""The networks under study, and the arms made from them: the same network under different normalizations."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError, quote_error
from ..factories import find_factory
from ..model_tools.insert import Normalized, insert, strip
from ..model_tools.kinds import spatial_dims
from ..moments import Renorm

ARMS = ("none", "batch", "batch_no_affine", "ghost", "renorm", "layer", "group", "instance")
BUILT_IN = ("mlp", "cnn")


@dataclass(frozen=True)
class Architecture:
    """What to build for every arm: the model's name, the samples' shape, the number of labels, the batch size."""

    model: str
    shape: tuple[int, ...]
    classes: int
    batch_size: int

    def build(self, arm: str, seed: int) -> nn.Module:
        """Returns the network of an arm, initialized from `seed`; equal weights in every arm of one seed.

        Raises:
            UserError: the factory fails or returns no Module, or the arm cannot be made from this network.
        """
        torch.manual_seed(seed)
        model: nn.Module
        if self.model == "mlp":
            model = mlp(self.shape, self.classes)
        elif self.model == "cnn":
            model = cnn(self.shape, self.classes)
        else:
            model, finished = _call_factory(self.model, arm, seed)
            if finished:
                return model
        example = torch.zeros(2, *self.shape)
        _forward(model, example, f"{self.model} arm {arm}")
        return make_arm(model, arm, example, self.batch_size, self.model)

    def check(self, arm: str, seed: int, example: torch.Tensor) -> nn.Module:
        """Returns the arm's network after making sure that it turns `example` into one score a label."""
        model = self.build(arm, seed)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UserError(f"a network without parameters to learn, {self.model}, return one that has some")
        output = _forward(model, example, f"{self.model} arm {arm}")
        wanted = (len(example), self.classes)
        if not isinstance(output, torch.Tensor) or tuple(output.shape) != wanted:
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UserError(
                f"output {got} for {len(example)} samples does not fit the {self.classes} labels, "
                f"{self.model} arm {arm}, return scores of shape {wanted}"
            )
        return model


def _forward(model: nn.Module, example: torch.Tensor, where: str) -> Any:
    """Returns what the network makes of the example in evaluation mode; it is left in training mode."""
    try:
        with torch.no_grad():
            return model.eval()(example)
    except Exception as error:
        raise UserError(
            f"forward fails on samples of shape {tuple(example.shape[1:])} ({quote_error(error)}), "
            f"{where}, make it fit the data or choose other data"
        ) from error
    finally:
        model.train()


def mlp(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Returns the network of Figure 1 of arXiv 1502.03167: three hidden layers of 100 sigmoid units.

    Weights are small Gaussian numbers as in the paper, of the width that Glorot & Bengio (2010) derive for
    saturating units (0.1 between two layers of 100), which is the best known start for the network WITHOUT
    batch normalization: the baseline shall not lose for a bad one.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for _ in range(3):
        layers += [nn.Linear(width, 100), nn.Sigmoid()]
        width = 100
    model = nn.Sequential(*layers, nn.Linear(width, classes))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            layer.bias.data.zero_()
    return model


def cnn(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Returns a small convolutional network: 3×3 convolutions of 16, 32, 32 and 64 maps, ReLU, mean over positions.

    Made for 8×8 to 32×32 pixels, works on any size. He initialization, the one derived for ReLU.

    Raises:
        UserError: samples that are no images, (H, W) or (C, H, W).
    """
    if len(shape) not in (2, 3):
        raise UserError(f"cnn needs images (C, H, W), --model cnn with samples of shape {shape}, use --model mlp")
    layers: list[nn.Module] = [nn.Unflatten(1, (1, shape[0]))] if len(shape) == 2 else []
    width = 1 if len(shape) == 2 else shape[0]
    for maps, stride in ((16, 1), (32, 2), (32, 1), (64, 2)):
        layers += [nn.Conv2d(width, maps, 3, stride=stride, padding=1), nn.ReLU()]
        width = maps
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.bias.data.zero_()  # type: ignore[union-attr]  # made above, with a bias
    return model


def _call_factory(name: str, arm: str, seed: int) -> tuple[nn.Module, bool]:
    """Returns what the user's factory makes, and whether it has made the arm itself (it takes `arm`)."""
    factory = find_factory(name, built_in=BUILT_IN)
    try:
        parameters = set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # some callables written in C have none
        parameters = set()
    arguments = {key: value for key, value in (("arm", arm), ("seed", seed)) if key in parameters}
    try:
        model = factory(**arguments)
    except Exception as error:
        raise UserError(
            f"the factory raises ({quote_error(error)}), {name} arm {arm} seed {seed}, correct it or write it "
            "as function() or function(arm, seed)"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the factory returns {type(model).__name__} and no torch.nn.Module, {name} arm {arm}, return the network"
        )
    return model, "arm" in parameters


def make_arm(model: nn.Module, arm: str, example: torch.Tensor, batch_size: int, name: str) -> nn.Module:
    """Returns the network with the arm's normalization after every hidden Conv/Linear layer, in place.

    Every arm starts from the stripped network, so arms differ in the normalization alone; all but ``none``
    get BN by `insert`, which is then replaced by the arm's own layer of the same width.
    """
    try:
        plain = strip(model, example)
        if arm == "none":
            return plain
        normalized = insert(plain, example)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"batch normalization cannot be put in or taken out ({quote_error(error)}), {name} arm {arm}, "
            "write the factory as function(arm, seed) and build the arm in it"
        ) from error
    places = dict.fromkeys(module for module in normalized.modules() if isinstance(module, Normalized))
    if not places:
        raise UserError(f"no hidden Conv or Linear layer to normalize, {name} arm {arm}, give a deeper network")
    for place in places:
        place.batch_norm = _norm(arm, place, batch_size, name)
    return normalized


def _norm(arm: str, place: Normalized, batch_size: int, name: str) -> nn.Module:
    """Returns the arm's layer for a place where `insert` has put a BN."""
    bn = place.batch_norm
    assert isinstance(bn, nn.modules.batchnorm._BatchNorm)
    kind: Any = type(bn)
    features = bn.num_features
    if arm == "layer":
        return nn.GroupNorm(1, features)  # over all channels and positions of one sample: layer normalization
    if arm == "group":
        return nn.GroupNorm(features // group_width(features), features)
    if arm == "instance":
        dimensions = spatial_dims(place.layer)
        if dimensions == 0:
            raise UserError(
                "a fully connected layer has one value a channel and nothing for instance normalization to average, "
                f"--arms instance with {name}, leave the arm out or use a network whose hidden layers are convolutions"
            )
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1](features, affine=True)
    if arm == "batch_no_affine":
        return kind(features, affine=False)
    if arm == "ghost":
        return kind(features, ghost_batch_size=max(2, batch_size // 4))
    if arm == "renorm":
        return kind(features, renorm=Renorm(r_max=3.0, d_max=5.0))
    return bn


def group_width(features: int) -> int:
    """Returns the divisor of `features` nearest 16 on a log scale: arXiv 1803.08494, Table 3 (16 a group)."""
    divisors = [d for d in range(1, features + 1) if features % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / 16)))
