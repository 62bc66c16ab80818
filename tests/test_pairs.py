"""The pairs of docs/variants/README.md that tests/test_composition.py does not run: a variant under a way of running.

Frozen, checkpointed (both modes, with and without autocast), compiled, exported, in the pure form, under vmap: each
against the same layer run plainly. The synchronized row is in tests/distributed/sync_worker.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNormAct1d, Renorm
from batchnorm.functional import Buffers, batch_norm_pure

VARIANTS = {
    "plain": {},
    "masked": {},
    "ghost": {"ghost_batch_size": 3},
    "renorm": {"renorm": Renorm(1.3, 0.2)},
    "domains": {"domains": 2, "domain_affine": True},
    "skip": {"nonfinite": "skip"},
    "accumulation": {"accumulation_steps": 2},
    "axis": {"feature_axis": -1},
    "average": {"momentum": None},
    "frozen": {},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()  # one function compiled for variant after variant would run into the recompile limit


def build(variant):
    layer = BatchNormAct1d(3, "silu", **VARIANTS[variant])
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.norm.frozen = variant == "frozen"
    return layer


def batch(variant):
    """The arguments of a call, and a gradient."""
    x = torch.randn(6, 4, 3) * 2 + 1 if variant == "axis" else torch.randn(6, 3, 4) * 2 + 1
    mask = torch.rand(6, 4) < 0.7 if variant == "masked" else None
    return x, mask, 1 if variant == "domains" else 0, torch.randn_like(x)


def call(layer, x, mask, domain):
    return layer(x, None, mask, domain)


def gradients(run, layer, x, mask, domain, g):
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    out = run(layer, leaf, mask, domain)
    out.backward(g.to(out.dtype))
    return out, leaf.grad, *(p.grad for p in layer.parameters())


def assert_same_training(run, variant, plain=call):
    """Three steps of `run` and three plain ones: outputs, gradients and buffers."""
    layer = build(variant)
    again = copy.deepcopy(layer)
    for _ in range(3):
        arguments = batch(variant)
        torch.testing.assert_close(gradients(run, layer, *arguments), gradients(plain, again, *arguments))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(again.named_buffers()))


@every_variant
def test_frozen_is_evaluation_with_a_gradient(variant):
    layer = build(variant)
    for _ in range(2):
        call(layer, *batch(variant)[:3])
    evaluated = copy.deepcopy(layer).eval()
    evaluated.norm.frozen = False
    layer.norm.frozen = True
    before = copy.deepcopy(layer.state_dict())
    arguments = batch(variant)
    for _ in range(2):
        found = gradients(call, layer.train(), *arguments)
        torch.testing.assert_close(found, gradients(call, evaluated, *arguments))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer.norm.frozen = False
    layer.eval()
    torch.testing.assert_close(call(layer, *arguments[:3]), call(evaluated, *arguments[:3]))


@every_variant
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("amp", [False, True])
def test_checkpointing_changes_nothing(variant, use_reentrant, amp):
    def plain(layer, *arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return call(layer, *arguments)

    def checkpointed(layer, *arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return checkpoint(call, layer, *arguments, use_reentrant=use_reentrant)

    assert_same_training(checkpointed, variant, plain)


@every_variant
def test_compile_without_a_graph_break(variant):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same_training(compiled, variant)


@every_variant
def test_compile_around_checkpointing(variant):
    compiled = torch.compile(lambda *arguments: checkpoint(call, *arguments, use_reentrant=False), backend="aot_eager")
    assert_same_training(compiled, variant)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("renorm", "accumulation")])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_around_compile(variant, use_reentrant):
    """The graph is the same in both runs: the operator in it must see that the second is inside a backward."""
    compiled = torch.compile(call, backend="aot_eager")
    assert_same_training(lambda *a: checkpoint(compiled, *a, use_reentrant=use_reentrant), variant)


@pytest.mark.parametrize("variant", ["renorm", "accumulation"])
def test_checkpointing_around_compile_is_refused_where_python_keeps_something(variant):
    layer = build(variant)
    compiled = torch.compile(call, backend="aot_eager")
    x, mask, domain, g = batch(variant)
    out = checkpoint(compiled, layer, x.requires_grad_(), mask, domain, use_reentrant=False)
    with pytest.raises(RuntimeError, match="compile the function that calls checkpoint"):
        out.backward(g)


@every_variant
@pytest.mark.parametrize("training", [True, False])
def test_an_exported_program_needs_nothing_of_ours(variant, training):
    layer = build(variant).train(training)
    x, mask, domain, _ = batch(variant)
    if variant == "accumulation" and training:
        with pytest.raises(NotImplementedError, match="accumulation_steps in training"):
            torch.export.export(layer, (x, None, mask, domain))
        return
    program = torch.export.export(layer, (x, None, mask, domain))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("batchnorm." in target or "batchnorm::" in target for target in targets)
    module = program.module()
    for _ in range(2):
        x, mask, domain, _ = batch(variant)
        torch.testing.assert_close(module(x, None, mask, domain), call(layer, x, mask, domain))
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, layer.get_buffer(name))


@every_variant
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_by_vmap(variant, training):
    layers = [build(variant).train(training) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    buffers = {name: value.clone() for name, value in buffers.items()}
    batches = [batch(variant) for _ in layers]
    xs = torch.stack([b[0] for b in batches])
    masks = torch.stack([b[1] for b in batches]) if variant == "masked" else None

    def one(parameters, buffers, x, mask):
        return functional_call(layers[0], (parameters, buffers), (x, None, mask, batches[0][2]))

    run = vmap(one, in_dims=(0, 0, 0, None if masks is None else 0))
    if variant == "accumulation" and training:
        with pytest.raises(NotImplementedError, match="accumulation_steps in training"):
            run(parameters, buffers, xs, masks)
        return
    outs = run(parameters, buffers, xs, masks)
    for index, (layer, (x, mask, domain, _)) in enumerate(zip(layers, batches, strict=True)):
        torch.testing.assert_close(outs[index], call(layer, x, mask, domain))
        for name, value in layer.named_buffers():
            torch.testing.assert_close(buffers[name][index], value)


PURE = ["plain", "masked", "ghost", "renorm", "skip", "axis", "average", "domains", "frozen"]


def pure(layer, x, mask, domain):
    """The layer's call in the pure form; a domain is the buffers that are given."""
    layer = layer.norm
    memory = layer.memory(domain)
    keywords = {name: getattr(layer, name) for name in ("ghost_batch_size", "renorm", "nonfinite", "feature_axis")}
    return batch_norm_pure(
        x, Buffers(*memory[:3]), *memory[3:], not layer.frozen, layer.momentum, activation="silu", mask=mask, **keywords
    )


@pytest.mark.parametrize("variant", PURE)
def test_the_pure_form_of(variant):
    layer = build(variant)
    for _ in range(3):
        x, mask, domain, g = batch(variant)
        (out, new), given = pure(layer, x, mask, domain), copy.deepcopy(layer.norm.memory(domain)[:3])
        want = gradients(lambda *a: pure(*a)[0], layer, x, mask, domain, g)
        torch.testing.assert_close(layer.norm.memory(domain)[:3], given, rtol=0, atol=0)
        torch.testing.assert_close(gradients(call, layer, x, mask, domain, g), want)
        torch.testing.assert_close(out, want[0])
        torch.testing.assert_close(tuple(new), layer.norm.memory(domain)[:3])


@pytest.mark.parametrize("variant", ["plain", "masked", "renorm"])
@pytest.mark.parametrize("way", ["checkpoint", "compile"])
def test_the_pure_form_checkpointed_and_compiled(variant, way):
    layer = build(variant)
    x, mask, domain, g = batch(variant)
    runs = {
        "checkpoint": lambda *a: checkpoint(pure, *a, use_reentrant=False),
        "compile": torch.compile(pure, fullgraph=True, backend="aot_eager"),
    }
    (_, new), (_, wanted) = runs[way](layer, x, mask, domain), pure(layer, x, mask, domain)
    torch.testing.assert_close(tuple(new), tuple(wanted))
    torch.testing.assert_close(
        gradients(lambda *a: runs[way](*a)[0], layer, x, mask, domain, g),
        gradients(lambda *a: pure(*a)[0], layer, x, mask, domain, g),
    )


def test_what_the_pure_form_cannot_be():
    given = Buffers(torch.zeros(3), torch.ones(3), torch.tensor(0))
    with pytest.raises(TypeError, match="accumulation_steps"):
        batch_norm_pure(torch.randn(4, 3), given, accumulation_steps=2)


def test_domains_by_sample_break_the_graph():
    """The sizes of the parts are read on the host: torch.compile works, but not in one graph."""
    layer = BatchNormAct1d(3, None, domains=2)
    again = copy.deepcopy(layer)
    x, domain = torch.randn(6, 3, 4), torch.tensor([0, 1, 1, 0, 0, 1])
    compiled = torch.compile(call, backend="aot_eager")
    torch.testing.assert_close(compiled(layer, x, None, domain), call(again, x, None, domain))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(again.named_buffers()))
    torch.compiler.reset()
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        torch.compile(call, fullgraph=True, backend="aot_eager")(layer, x, None, domain)
