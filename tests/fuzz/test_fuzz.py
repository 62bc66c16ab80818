"""The fuzzer: a few seconds of each target, and that each target sees a broken tool."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.rebuild.recipe import Recipe

from .compare import Discard, Mismatch, Refused, Snapshot, agree, exact_batch_norm, reference, tool, train
from .program import Case, Made, Program, Step, Touch, load
from .runner import Finding, fuzz, run_case
from .targets import TARGETS

LAYER = Made("nn.Conv2d", (2, 3, (1, 1)))
NORM = Made("nn.BatchNorm2d", (3,))
STEPS = (Step("{m}({0})", (0,), "a"), Step("{m}({0})", (1,), "b"), Step("F.relu({0})", (2,)))
PAIR = Program((("a", LAYER), ("b", NORM)), STEPS, (3,), (2, 2, 3, 3))
SEED = 1
CASES = {  # about a second each
    "layers": 40, "convert_revert": 15, "fold": 5, "fuse": 2, "recalibrate": 12, "freeze": 12, "insert_strip": 8,
    "fold_onnx": 10, "save_memory": 30, "triton": 4,
}  # fmt: skip
module_of = {name: importlib.import_module(f"tests.fuzz.targets.{name}") for name in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_runs_and_finds_nothing(target):
    """Always the same seed here: what other seeds find is for `make fuzz`."""
    if target == "triton":
        pytest.importorskip("triton", reason="the kernels are written in Triton, which has wheels for Linux only")
    log = fuzz(target, 60.0, start=SEED, say=lambda line: None, grace=5.0, cases=CASES[target])
    assert not log.findings, log.findings[0].text()
    assert log.outcomes["agreed"]
    assert log.kinds


# --- each target can fail ------------------------------------------------------------------------------


def wrong(function, change):
    """The tool, and then `change` on what it returns."""

    def broken(*args, **kwargs):
        result = function(*args, **kwargs)
        change(result)
        return result

    return broken


def scale(model):
    with torch.no_grad():
        next(iter(model.parameters())).mul_(1.001)


def test_convert_revert_sees_a_wrong_weight_and_a_changed_mode(monkeypatch):
    case = Case("convert_revert", PAIR)
    convert = batchnorm.convert
    monkeypatch.setattr(batchnorm, "convert", wrong(convert, scale))
    with pytest.raises(Mismatch, match="is off by"):
        run_case(case)
    monkeypatch.setattr(batchnorm, "convert", wrong(convert, lambda model: model.b.train()))
    with pytest.raises(Mismatch, match="modes"):
        run_case(case)


def test_save_memory_sees_an_output_that_is_rebuilt_wrong(monkeypatch):
    program = Program(
        (*PAIR.modules, ("c", Made("nn.Conv2d", (3, 2, (1, 1))))), (*STEPS, Step("{m}({0})", (3,), "c")), (4,),
        (2, 2, 3, 3), training=True,
    )  # fmt: skip
    case = Case("save_memory", program)
    assert run_case(case) == "agreed"
    output = Recipe.output
    monkeypatch.setattr(Recipe, "output", lambda recipe: output(recipe) * 1.001)
    with pytest.raises(Mismatch, match=r"gradient c\.weight is not the same"):
        run_case(case)


def test_fold_sees_a_wrong_weight_and_a_changed_model(monkeypatch):
    fold = batchnorm.fold
    monkeypatch.setattr(batchnorm, "fold", wrong(fold, lambda folded: scale(folded.model)))
    with pytest.raises(Mismatch, match="output 0 is off by"):
        run_case(Case("fold", PAIR))

    def careless(model, example):
        model.b.running_mean.add_(1)
        return fold(model, example)

    monkeypatch.setattr(batchnorm, "fold", careless)
    with pytest.raises(Mismatch, match=r"the tensor 'b\.running_mean' is another"):
        run_case(Case("fold", PAIR))


def test_fuse_sees_a_wrong_activation(monkeypatch):
    def broken(model):
        other = copy.deepcopy(model)
        scale(other)
        return other

    monkeypatch.setattr(batchnorm, "fuse", broken)
    with pytest.raises(Mismatch, match="is off by"):
        run_case(Case("fuse", PAIR))


@pytest.mark.parametrize("layerwise", [True, False])
def test_recalibrate_sees_a_biased_variance_and_a_lost_undo(monkeypatch, layerwise):
    recalibrate = batchnorm.recalibrate
    case = Case("recalibrate", PAIR, arguments=(("cuts", (2, 3)), ("layerwise", layerwise)))

    def biased(model, batches, **options):
        result = recalibrate(model, batches, **options)
        model.b.running_var.mul_(0.99)
        return result

    monkeypatch.setattr(batchnorm, "recalibrate", biased)
    with pytest.raises(Mismatch, match="the variance of b is off by"):
        run_case(case)
    monkeypatch.setattr(batchnorm, "recalibrate", wrong(recalibrate, lambda result: result.buffers_before.clear()))
    with pytest.raises(Mismatch, match="after undo the tensor"):
        run_case(case)


def test_freeze_sees_statistics_that_move_and_a_mode_that_is_lost(monkeypatch):
    freeze, unfreeze = batchnorm.freeze, batchnorm.unfreeze

    def thaws(model, **options):
        freeze(model, **options)
        model.b.running_mean.add_(0.1)
        return model

    monkeypatch.setattr(batchnorm, "freeze", thaws)
    with pytest.raises(Mismatch, match=r"the tensor 'b\.running_mean' is another"):
        run_case(Case("freeze", PAIR))
    monkeypatch.setattr(batchnorm, "freeze", freeze)
    monkeypatch.setattr(batchnorm, "unfreeze", wrong(unfreeze, lambda model: model.b.requires_grad_(False)))
    with pytest.raises(Mismatch, match="requires_grad or grad"):
        run_case(Case("freeze", PAIR))


@pytest.mark.parametrize("way", ["insert", "strip"])
def test_insert_strip_sees_a_wrong_weight(monkeypatch, way):
    monkeypatch.setattr(batchnorm, way, wrong(getattr(batchnorm, way), scale))
    program = PAIR
    if way == "insert":  # a layer whose result is not the model's
        program = Program(
            (("a", LAYER), ("b", Made("nn.Conv2d", (3, 1, (1, 1))))),
            (STEPS[0], Step("F.relu({0})", (1,)), Step("{m}({0})", (2,), "b")), (3,), (2, 2, 3, 3),
        )  # fmt: skip
    with pytest.raises(Mismatch, match="is off by"):
        run_case(Case("insert_strip", program, arguments=(("way", way),)))


def test_insert_strip_sees_a_bias_that_does_not_come_back(monkeypatch):
    hidden = Program(
        (("a", LAYER), ("b", Made("nn.Conv2d", (3, 1, (1, 1))))),
        (STEPS[0], Step("F.relu({0})", (1,)), Step("{m}({0})", (2,), "b")), (3,), (2, 2, 3, 3),
    )  # fmt: skip
    monkeypatch.setattr(
        batchnorm, "strip", wrong(batchnorm.strip, lambda model: model.a.register_parameter("bias", None))
    )
    with pytest.raises(Mismatch, match="after insert and strip"):
        run_case(Case("insert_strip", hidden, arguments=(("way", "both"),)))


def test_fold_onnx_sees_a_wrong_file(monkeypatch):
    import onnx
    from onnx import numpy_helper

    graphs = module_of["fold_onnx"]
    nodes = (
        graphs.Node("Conv", (0,), ((3, 2, 1, 1),)),
        graphs.Node("BatchNormalization", (1,), ((3,),) * 4),
    )
    case = Case("fold_onnx", problem=graphs.Graph(nodes, (1, 2, 3, 3), (2,)))
    assert run_case(case) == "agreed"
    fold_onnx = batchnorm.fold_onnx

    def broken(source, target):
        report = fold_onnx(source, target)
        model = onnx.load(str(target))
        weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
        onnx.save(model, str(target))
        return report

    monkeypatch.setattr(batchnorm, "fold_onnx", broken)
    with pytest.raises(Mismatch, match="an output is off by"):
        run_case(case)


def test_layers_sees_a_wrong_momentum_and_a_wrong_gradient(monkeypatch):
    layers = module_of["layers"]
    case = Case("layers", problem=layers.Layer(layers.Problem((4, 3, 5))))
    assert run_case(case) == "agreed"
    forward = batchnorm.BatchNorm1d.forward

    def drifting(layer, *args, **kwargs):
        out = forward(layer, *args, **kwargs)
        layer.running_mean.mul_(1.001)
        return out

    monkeypatch.setattr(batchnorm.BatchNorm1d, "forward", drifting)
    with pytest.raises(Mismatch, match="running_mean"):
        run_case(case)

    def steep(layer, input, *args, **kwargs):
        input.register_hook(lambda grad: grad * 1.001)
        return forward(layer, input, *args, **kwargs)

    monkeypatch.setattr(batchnorm.BatchNorm1d, "forward", steep)
    with pytest.raises(Mismatch, match="gradient input"):
        run_case(case)


def test_triton_sees_a_wrong_kernel(monkeypatch):
    pytest.importorskip("triton", reason="the kernels are written in Triton, which has wheels for Linux only")
    from batchnorm.ops import register

    triton, kernel = module_of["triton"], register.kernel
    case = Case("triton", problem=triton.Kernels(triton.Problem((3, 2, 5))))
    assert run_case(case) == "agreed"

    def broken(name):
        return (lambda *given: [part * 1.01 for part in kernel(name)(*given)]) if name == "backward" else kernel(name)

    monkeypatch.setattr(register, "kernel", broken)
    with pytest.raises(Mismatch, match="relative error"):
        run_case(case)


# --- the parts ------------------------------------------------------------------------------------------


def test_the_runner_finds_and_shrinks_and_writes_a_test_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(batchnorm, "convert", wrong(batchnorm.convert, scale))
    log = fuzz("convert_revert", 20.0, start=3, limit=1, say=lambda line: None)
    (finding,) = log.findings
    assert len(finding.case.program.steps) <= 3
    path = tmp_path / "test_case.py"
    path.write_text(finding.text())
    with pytest.raises(Mismatch):
        load(path.read_text()).test_found()


def test_what_is_known_hides_nothing_else():
    first = Finding(Case("fold", PAIR), Mismatch("0 output 0 is off by 0.5 of the largest value"), 1)
    again = Finding(Case("fold", PAIR), Mismatch("1 output 0 is off by 3e-4 of the largest value"), 2)
    other = Finding(Case("fold", PAIR), Mismatch("after fold the tensor 'a.weight' is another"), 3)
    assert first.signature == again.signature != other.signature


def test_a_refusal_has_to_leave_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(Refused), tool(model):
        raise batchnorm.UserError("no")

    def changes_and_refuses():
        model.eval()
        raise batchnorm.UserError("no")

    with pytest.raises(Mismatch, match="after a refusal"), tool(model):
        changes_and_refuses()
    with pytest.raises(Mismatch, match="one line"), tool(model, errors=(ValueError,)):
        raise ValueError("a\nb") from None
    with pytest.raises(Mismatch, match="random generator"), tool(model):
        torch.rand(1)


@pytest.mark.parametrize("change", [
    lambda m: m.train(), lambda m: m[0].register_forward_hook(print), lambda m: m[0].weight.data.add_(1),
    lambda m: m[0].requires_grad_(False), lambda m: setattr(m[0], "more", 1), lambda m: m.append(nn.ReLU()),
    lambda m: setattr(m[0].weight, "grad", torch.ones(2)), lambda m: setattr(m[0], "__class__", nn.BatchNorm2d),
])  # fmt: skip
def test_a_snapshot_sees_every_change(change):
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    snapshot = Snapshot(model)
    snapshot.check(model, "nothing")
    change(model)
    with pytest.raises(Mismatch):
        snapshot.check(model, "a change")


def test_rounding_is_no_finding_and_more_than_rounding_is():
    make = load(Case("fold", PAIR).text()).make
    want = reference(make, train)
    agree({name: value * (1 + 1e-12) for name, value in want.items()}, make, train, want, torch.float64)
    with pytest.raises(Mismatch):
        agree({name: value * (1 + 1e-6) for name, value in want.items()}, make, train, want, torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 2, 3, 1), (2, 3, 2, 2, 2)])
def test_the_reference_knows_what_a_batch_norm_is(shape, training):
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    grad, stats = torch.randn_like(x), [torch.full((shape[1],), v, dtype=torch.float64) for v in (0.5, 2.0) * 2]
    out = exact_batch_norm(x, stats[0], stats[1], weight, bias, training, 0.3, 1e-3)
    want = torch.nn.functional.batch_norm(x, stats[2], stats[3], weight, bias, training, 0.3, 1e-3)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(stats[:2], stats[2:])
    torch.testing.assert_close(torch.autograd.grad(out, x, grad), torch.autograd.grad(want, x, grad))


def test_a_program_that_does_not_run_is_discarded():
    program = Program((("a", LAYER),), (Step("{m}({0})", (0,), "a"),), (1,), (2, 5, 3, 3))
    assert run_case(Case("convert_revert", program)) == "discarded"
    with pytest.raises(Discard):
        reference(load(Case("fold", program).text()).make, train)


def test_touches_reach_the_module():
    touched = Program(PAIR.modules, PAIR.steps, (3,), PAIR.shape, (Touch("hook", "b"), Touch("no grad", "a")))
    model, _ = load(Case("fold", touched).text()).make()
    assert len(model.b._forward_hooks) == 1
    assert not model.a.weight.requires_grad
    assert {"touch: hook", "nn.BatchNorm2d", "F.relu({0})"} <= touched.features()


@pytest.mark.slow
def test_the_command(tmp_path):
    root = Path(__file__).parents[2]
    arguments = [sys.executable, "-m", "tests.fuzz", "--seconds", "1", "--targets", "layers", "--seed", "1"]
    done = subprocess.run([*arguments, "--found", str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layers: seed 1" in done.stdout
    unknown = subprocess.run([*arguments[:-4], "--targets", "none"], cwd=root, capture_output=True, text=True)
    assert unknown.returncode == 2
