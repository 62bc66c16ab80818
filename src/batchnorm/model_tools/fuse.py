"""The `torch.compile` backend "batchnorm": normalization, addition and activation become one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UserError
from ..functional import batch_norm
from .fuse_match import Chain, arguments_of, is_batch_norm, match, may_move, value

__all__ = ["backend", "fuse", "fuse_graph"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fuse(model: nn.Module, **options: Any) -> Any:
    """`torch.compile(model, backend="batchnorm")`: each batch normalization with the addition and the activation after
    it becomes one operator, forward and backward, in training and eval; everything else runs as it did.

    The model is not changed and shares its parameters with what is returned. Found are `F.batch_norm` and
    `torch.batch_norm`, as every module calls them, an addition of a tensor of the same shape, and relu, relu6,
    leaky_relu, silu, hardswish, sigmoid and tanh as modules, functions, methods, in place, or written out
    (x·sigmoid(x), x·relu6(x + 3)/6). A value that something else reads ends the chain before it. A new batch size
    costs one compilation with a dynamic shape, later ones none.

    Args:
        model: a module, or a function.
        **options: `rest`, the backend for what is left: a name `torch.compile` knows or a function; default "eager".

    Returns:
        What `torch.compile` returns.

    Raises:
        UserError: an unknown option.
    """
    _check(options)
    return torch.compile(model, backend=backend, options=options or None)


def backend(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend itself, registered as "batchnorm" by the package's entry point `torch_dynamo_backends`."""
    _check(options or {})
    fuse_graph(gm)
    rest = (options or {}).get("rest", "eager")
    if rest == "eager":
        return gm.forward
    compiler: Callable[..., Any] = torch._dynamo.lookup_backend(rest)
    return compiler(gm, example_inputs)


def _check(options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - {"rest"})
    if unknown:
        raise UserError(f"fuse: unknown option {unknown[0]!r}; there is one, 'rest', the backend for what is left")


def fuse_graph(gm: fx.GraphModule) -> int:
    """Replace in the graph, and in the graphs inside it, and return how many normalizations it replaced."""
    replaced = 0
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        norms = [node for node in module.graph.nodes if is_batch_norm(node)]
        for norm in norms:
            if _ours_is_faster(norm):
                chain = match(norm)
                if len(chain.nodes) > 1 and chain.view is None and not may_move(chain, module.graph):
                    chain = Chain([norm], None, "", 0.01)
                _replace(module.graph, chain)
                replaced += 1
        if norms:
            module.graph.lint()
            module.recompile()
    return replaced


def _ours_is_faster(norm: fx.Node) -> bool:
    """On the CPU, and wherever a kernel of ours is registered; elsewhere the composed form would be slower."""
    tensor = value(arguments_of(norm)["input"])
    if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
        return False
    if tensor.device.type == "cpu":
        return True
    key = torch._C._dispatch_key_for_device(tensor.device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("batchnorm::forward", key)


def _replace(graph: fx.Graph, chain: Chain) -> None:
    last = chain.nodes[-1]
    reads = arguments_of(chain.nodes[0])
    keywords: dict[str, Any] = {}
    if chain.activation:
        keywords["activation"] = chain.activation
    if chain.activation == "leaky_relu":
        keywords["negative_slope"] = chain.negative_slope
    if chain.residual is not None:
        keywords["residual"] = chain.residual
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    first = chain.nodes[0]
    with graph.inserting_before(last if chain.view is None else first):
        fused = graph.call_function(batch_norm, tuple(reads[name] for name in names), keywords)
    if chain.view is None:
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
    else:
        fused.meta = dict(first.meta)
        first.replace_all_uses_with(fused)
        last.replace_all_uses_with(chain.view)
    for node in reversed(chain.nodes):
        graph.erase_node(node)
