"""Quantization of an exported program (torchao's PT2E), whose patterns are torch's operators."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from .nets import KINDS, images, pair


@pytest.fixture(scope="module")
def pt2e():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, at its import
        module = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
        pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    return module


def quantized(pt2e, model: nn.Module, data: list[torch.Tensor], is_qat: bool) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    shapes = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(copy.deepcopy(model).train(is_qat), (data[0],), dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=is_qat))
    prepare = pt2e.prepare_qat_pt2e if is_qat else pt2e.prepare_pt2e
    prepared = prepare(program, quantizer)
    for batch in data:
        prepared(batch)
    if is_qat:
        move_exported_model_to_eval(prepared)
    return pt2e.convert_pt2e(prepared)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "is_qat", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["after training", "in training"]
)
@torch.no_grad()
def test_as_torchs(pt2e, kind, is_qat):
    """As near to torch's as a rounding is, and nothing of ours in the program."""
    theirs, ours = pair(kind, torch.float32)
    data = [images(16, torch.float32) for _ in range(4)]
    ours_quantized, theirs_quantized = (quantized(pt2e, model, data, is_qat) for model in (ours, theirs))
    found, expected = ours_quantized(data[0]), theirs_quantized(data[0])
    assert torch.equal(ours_quantized(data[0][:2]), found[:2])  # no statistics of the batch
    error = ((found - expected).square().mean() / expected.var()).sqrt()
    assert error < 0.05  # a rounding may fall to the other side
    targets, theirs_targets = (operators(model) for model in (ours_quantized, theirs_quantized))
    assert not any("batchnorm" in target for target in targets)
    # In training the quantizer looks for modules by their class's full name, so that a subclass of torch's, ours too,
    # has a rounding less or more; a norm before which there is no convolution stays in both.
    norms = [[target for target in found if "batch_norm" in target] for found in (targets, theirs_targets)]
    assert norms[0] == norms[1]
    assert is_qat or targets == theirs_targets


def operators(program: nn.Module) -> list[str]:
    return sorted(str(node.target) for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_program_says_where_its_operators_come_from_as_torchs_does(kind, training):
    """Quantizers find a convolution and its normalization by these notes: which function of torch an operator is of."""
    notes = []
    for model in pair(kind):
        program = torch.export.export(model.train(training), (images(),)).module()
        called = [node for node in program.graph.nodes if node.op == "call_function"]
        notes.append([(str(node.target), node.meta["torch_fn"][1]) for node in called])
    assert notes[1] == notes[0]
