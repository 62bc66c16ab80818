"""The user's own network with batch normalization (`insert`) and without it (`strip`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import UserError
from ..inspect.from_run import graph_of_run
from ..inspect.graph import ModelGraph
from ..inspect.modules import is_layer, is_norm, names_of, out_features, spatial_dims
from ..inspect.reading import decided
from ..inspect.untouched import untouched
from ..layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .replace import replace_all
from .rest import rest_of

__all__ = ["Normalized", "insert", "strip"]


class Normalized(nn.Module):
    """A layer followed by its batch normalization: `batch_norm(layer(input))`.

    Attributes of the layer (`weight`, `in_features`, …) can be read here as they could before. The layer's
    bias is taken out, since the normalization subtracts it again; it is kept aside for `strip`.

    Shape: as the layer's. The channels of a Linear are its last axis: all axes before it are the batch.
    """

    def __init__(self, layer: nn.Module, batch_norm: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.batch_norm = batch_norm
        self.training = layer.training
        # In a tuple, so that it is no parameter of the model while it is not in use.
        self._bias_before = (layer._parameters.get("bias"),)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result = self.layer(*args, **kwargs)
        axis = result.dim() - 1 - spatial_dims(self.layer)
        if axis == 1:
            return self.batch_norm(result)
        if axis == 0:  # a convolution of one sample without a batch axis
            return self.batch_norm(result.unsqueeze(0)).squeeze(0)
        return self.batch_norm(result.reshape(-1, result.shape[-1])).reshape(result.shape)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(super().__getattr__("layer"), name)


def insert(model: nn.Module, example_input: Any, *, trust_example: bool = False, **keywords: Any) -> nn.Module:
    """Put a batch normalization after every hidden Conv, ConvTranspose and Linear, in place.

    It stands before the activation, and the layer's bias is dropped, since the normalization subtracts it.
    What is hidden is seen by running the example: a layer whose result the model returns, or whose result
    reaches what the model returns without passing another layer, is an output layer and left alone. What something
    holds when the forward is over (`self.aux = self.side(x)`) counts as returned where it goes into no other layer.
    Left alone, too, are a layer whose result already meets a batch normalization before its activation, and one that
    the example never calls. A layer called several times gets one batch normalization that is called as often.

    In the model each such layer becomes a `Normalized` with the parts `layer` and `batch_norm`: the model's
    forward and the layer's attributes stay; in the `state_dict`, `fc.weight` becomes `fc.layer.weight`.

    Args:
        model: any module; its mode decides which way through the forward is looked at.
        example_input: what the model is called with: a tensor, a tuple of positional or a dict of keyword
            arguments. One sample is enough here; training then needs more than one value per channel.
        trust_example: True leaves a layer alone that the example does not reach, also where control flow depends
            on the data, so that another input may reach it.
        **keywords: handed to `BatchNorm1d/2d/3d` (`eps`, `momentum`, `affine`, …).

    Returns:
        The same model.

    Raises:
        UserError: the model does not run on the example, a layer's result has no batch axis, or the values of
            another input may reach a layer that this one does not; the model is then unchanged.
    """
    seen = _seen(model, example_input, "insert", trust_example)
    plan = _plan_insert(model, seen, keywords)
    biases = {layer: layer._parameters.get("bias") for layer in plan}
    done = replace_all(model, plan)  # type: ignore[arg-type]  # dict is invariant in its value type
    flags = _leave_fast_path(model, plan)
    for layer in plan:
        if not parametrize.is_parametrized(layer, "bias"):
            layer.register_parameter("bias", None)
    try:
        _check_called(graph_of_run(model, example_input, "insert"), seen, plan)
    except BaseException:
        for layer, bias in biases.items():
            if bias is not None:
                layer.register_parameter("bias", bias)
        for module, name, value in flags:
            setattr(module, name, value)
        done.undo()
        raise
    return done.root


def _seen(model: nn.Module, example: Any, what: str, trust_example: bool) -> ModelGraph:
    """What a run of the example shows, where that is all there is to see of the model's layers."""
    graph = graph_of_run(model, example, what)
    called = {call.module for call in graph.calls}
    missed = [name for name, module in model.named_modules() if is_layer(module) and module not in called]
    undecided = decided(graph, model, example).undecided if missed and not trust_example else ""
    if undecided:
        raise UserError(
            f"{what}: the example does not reach layer {missed[0]}, and {undecided}; pass an example that reaches all "
            "layers, or trust_example=True to go by this one"
        )
    return graph


def _plan_insert(model: nn.Module, seen: ModelGraph, keywords: dict[str, Any]) -> dict[nn.Module, Normalized]:
    left_alone = seen.output_layers() | set(seen.normalized_layers())
    names = names_of(model)
    plan: dict[nn.Module, Normalized] = {}
    for call in seen.calls:
        layer = call.module
        if layer is None or not is_layer(layer) or layer in left_alone:
            continue
        shape = call.output.shape if call.output else ()
        if len(shape) < 2 or shape[-1 - spatial_dims(layer)] != out_features(layer):
            raise UserError(
                f"insert: the result of layer {names[layer]} has shape {shape}, which has no axis for "
                f"the batch beside its {out_features(layer)} channels; pass a batch of samples as the example"
            )
        if layer not in plan:
            plan[layer] = Normalized(layer, _norm_for(layer, keywords))
    return plan


def _norm_for(layer: nn.Module, keywords: dict[str, Any]) -> nn.Module:
    kind = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)[spatial_dims(layer)]
    weight: Tensor = layer.weight  # type: ignore[assignment]  # nn.Module types it as Tensor | Module
    # Statistics in half precision would stop moving: below float32 the normalization keeps float32.
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    norm = kind(out_features(layer), device=weight.device, dtype=dtype, **keywords)
    norm.training = layer.training
    return norm


def _leave_fast_path(model: nn.Module, plan: dict[nn.Module, Normalized]) -> list[tuple[nn.Module, str, Any]]:
    """torch's encoder layers hand their Linears' weights to one fused operator in eval, which would pass by
    the normalizations: these two switches turn that off where a Linear inside was normalized."""
    before: list[tuple[nn.Module, str, Any]] = []
    inserted = set(plan.values())
    for module in model.modules():
        inside = inserted.intersection(module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and inside:
            before.append((module, "activation_relu_or_gelu", module.activation_relu_or_gelu))
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and inside:
            before.append((module, "use_nested_tensor", module.use_nested_tensor))
            module.use_nested_tensor = False
    return before


def _check_called(now: ModelGraph, before: ModelGraph, plan: dict[nn.Module, Normalized]) -> None:
    """A forward that looks at its layers' types, or keeps them elsewhere, would go another way now."""
    old = [call.module for call in before.calls]
    new = [call.module for call in now.calls if call.module not in {n.batch_norm for n in plan.values()}]
    for layer, normalized in plan.items():
        if len(now.calls_of(normalized.batch_norm)) != old.count(layer) or old != new:
            name = next(call.name for call in before.calls if call.module is layer)
            raise UserError(
                f"insert: the model's forward does not call layer {name} in the same way once it is wrapped "
                "(it looks at the layer's type, or keeps it elsewhere); put the batch normalization in by hand"
            )


def strip(model: nn.Module, example_input: Any, *, trust_example: bool = False) -> nn.Module:
    """Take every batch normalization out, in place, and give the layers before them their bias back.

    The result is the network as it would have been built without batch normalization, to be trained from
    there: a comparison's other arm. For trained weights it is *not* the same function, since what the
    normalizations did is lost; `batchnorm.fold` takes them out and keeps the function.

    A layer that `insert` normalized becomes again what it was, its own bias included. Any other batch
    normalization becomes an `nn.Identity` (ours with an activation or a residual: the rest of it), and a
    layer without a bias whose result met it gets one, drawn as torch draws a fresh layer's, from
    U(−1/√fan_in, 1/√fan_in); torch's generator is left where it was. A root that is itself a batch
    normalization is returned anew.

    Args:
        model: any module.
        example_input: as for `insert`.
        trust_example: True gives no bias to a layer that the example does not reach, also where control flow
            depends on the data.

    Returns:
        The same model.

    Raises:
        UserError: the model does not run on the example, calls `F.batch_norm` itself, holds another library's
            batch normalization that does more than normalize, or the values of another input may reach a layer that
            this one does not; the model is then unchanged.
    """
    seen = _seen(model, example_input, "strip", trust_example)
    if seen.functional_norms:
        raise UserError(
            f"strip: {type(model).__name__}{_at(seen.functional_norms[0])} calls batch_norm as a function (or "
            "in a module that is not registered, or in TorchScript), which cannot be taken out; write it as a "
            "registered BatchNorm module"
        )
    plan = _plan_strip(model)
    inserted = [module for module in plan if isinstance(module, Normalized)]
    own_bias = {normalized.layer for normalized in inserted}
    with untouched(model):
        biases = _fresh_biases(layer for layer in seen.normalized_layers() if layer not in own_bias)
    done = replace_all(model, plan)
    for normalized in inserted:
        _give_back(normalized)
    for layer, bias in biases.items():
        layer.register_parameter("bias", bias)
    return done.root


def _at(name: str) -> str:
    return f" at {name}" if name else ""


def _plan_strip(model: nn.Module) -> dict[nn.Module, nn.Module]:
    plan: dict[nn.Module, nn.Module] = {}
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, Normalized):
            plan[module] = module.layer
            inside.add(module.batch_norm)
        elif is_norm(module) and module not in inside:
            rest = rest_of(module)
            if rest is None:
                kind = f"{type(module).__module__}.{type(module).__qualname__}"
                raise UserError(
                    f"strip: {name or 'the model'} is a {kind}, which has a forward of its own that may do more than "
                    "normalize; replace it by a plain BatchNorm first"
                )
            plan[module] = rest
    return plan


def _fresh_biases(layers: Iterable[nn.Module]) -> dict[nn.Module, nn.Parameter]:
    """Biases for the layers that have none, with torch's initialization and without moving its generator."""
    biases: dict[nn.Module, nn.Parameter] = {}
    for layer in layers:
        weight: Tensor = layer.weight  # type: ignore[assignment]  # as above
        if layer._parameters.get("bias", layer) is not None:
            continue
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
        bound = fan_in**-0.5 if fan_in else 0.0
        values = torch.empty(out_features(layer), dtype=weight.dtype, device=weight.device)
        biases[layer] = nn.Parameter(values.uniform_(-bound, bound), requires_grad=weight.requires_grad)
    return biases


def _give_back(normalized: Normalized) -> None:
    (bias,) = normalized._bias_before
    layer = normalized.layer
    if bias is None or layer._parameters.get("bias", bias) is not None:
        return
    weight: Tensor = layer.weight  # type: ignore[assignment]  # as above
    if (bias.device, bias.dtype) != (weight.device, weight.dtype):  # the model was moved in between
        bias.data = bias.data.to(weight)
    layer.register_parameter("bias", bias)
