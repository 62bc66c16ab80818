"""The networks under study, and the arms made from them: the same network under different normalizations."""

from __future__ import annotations

import hashlib
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError, quote_error
from ...factories import find_factory
from ...inspect.modules import is_norm, spatial_dims
from ...model_tools.insert import Normalized, insert, strip
from ...model_tools.replace import replace_all
from .arms import ARMS, NormPlace
from .places import OwnPlace, own_places

BUILT_IN = ("mlp", "cnn")
# Where the arms' layers stand: in the places of the network's own normalizations (after every hidden layer of a network
# that has none), or after every hidden layer of the stripped network.
WHERE = ("same", "every")
# What the study's dropout does to a network that has its own: nothing, or it takes its place in every run.
DROPOUT = ("keep", "replace")


@dataclass(frozen=True)
class Architecture:
    """What to build for every arm: the model's name, the samples' shape, the number of labels, the batch size.

    `where` is a rule of `WHERE`; `dropout` of `DROPOUT`.
    """

    model: str
    shape: tuple[int, ...]
    classes: int
    batch_size: int
    where: str = "same"
    dropout: str = "keep"

    def build(self, arm: str, seed: int) -> nn.Module:
        """Return the network of an arm, initialized from `seed`; equal weights in every arm of one seed.

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
        return make_arm(model, arm, example, self.batch_size, self.model, self.where)

    def check(self, arm: str, seed: int, example: torch.Tensor) -> nn.Module:
        """Return the arm's network after making sure that it turns `example` into one score a label."""
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
    """Return what the network makes of the example in evaluation mode; it is left in training mode."""
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
    """Return the network of Figure 1 of arXiv 1502.03167: three hidden layers of 100 sigmoid units.

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
    """Return a small convolutional network: 3×3 convolutions of 16, 32, 32 and 64 maps, ReLU, mean over positions.

    Made for 8×8 to 32×32 pixels, works on any size. He initialization, the one derived for ReLU.

    Raises:
        UserError: samples that are no images, (H, W) or (C, H, W).
    """
    if len(shape) not in (2, 3):
        raise UserError(f"cnn needs images (C, H, W), study(model=cnn) with samples of shape {shape}, use mlp")
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
    """Return what the user's factory makes, and whether it has made the arm itself (it takes `arm`)."""
    factory = find_factory(name, "study(model=…)", built_in=BUILT_IN)
    try:
        parameters = set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # some functions written in C have no signature
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


def make_arm(
    model: nn.Module, arm: str, example: torch.Tensor, batch_size: int, name: str, where: str = "same"
) -> nn.Module:
    """Return the network of an arm, made in place.

    Every arm starts from the same network, so arms differ in the normalizations alone. ``as_written`` changes nothing.
    """
    if ARMS[arm].written:
        return model
    try:
        own = own_places(model, example) if where == "same" else {}
        if own:
            return _in_same_places(model, own, arm, example, batch_size, name)
        if arm == "without":
            raise UserError(
                f"no normalization to take out, {name} arm {arm}, name the arm as_written: it has none as it is"
            )
        plain = strip(model, example)
        if ARMS[arm].make is None:
            return plain
        normalized = insert(plain, example)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"batch normalization cannot be put in or taken out ({quote_error(error)}), {name} arm {arm}, "
            "write the factory as build(arm, seed) and make the arm in it"
        ) from error
    places = dict.fromkeys(module for module in normalized.modules() if isinstance(module, Normalized))
    if not places:
        raise UserError(f"no hidden Conv or Linear layer to normalize, {name} arm {arm}, give a deeper network")
    for place in places:
        place.batch_norm = _layer_of(arm, NormPlace(place.batch_norm, spatial_dims(place.layer), batch_size, name))
    return normalized


def _in_same_places(
    model: nn.Module, own: dict[nn.Module, OwnPlace], arm: str, example: torch.Tensor, batch_size: int, name: str
) -> nn.Module:
    """Return the network with the arm's layers where its own normalizations stand."""
    if ARMS[arm].make is None:
        # strip gives the layers before batch normalizations their bias back; nothing else has taken one.
        others = {norm: nn.Identity() for norm in own if not is_norm(norm)}
        return strip(replace_all(model, others).root, example)  # type: ignore[arg-type]  # dict is invariant
    plan: dict[nn.Module, nn.Module] = {}
    for norm, place in own.items():
        layer = _layer_of(arm, NormPlace(place.batch_norm(), place.spatial_dims, batch_size, name))
        if layer is not norm:
            plan[norm] = place.fit(layer)
    return replace_all(model, plan).root


def _layer_of(arm: str, place: NormPlace) -> nn.Module:
    make = ARMS[arm].make
    assert make is not None
    return make(place)


def model_digest(model: str) -> str | None:
    """Return a digest of the file that defines a user's network, None for the built-in ones."""
    if model in BUILT_IN:
        return None
    try:
        source = Path(inspect.getsourcefile(inspect.unwrap(find_factory(model, "study(model=…)"))) or "")
        return hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):  # defined without a file
        return None
