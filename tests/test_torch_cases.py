"""PyTorch's own cases (`module_db`, OpInfo samples and error inputs) against our classes and our function."""

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import batchnorm
from batchnorm.functional import batch_norm

OURS = {
    nn.BatchNorm1d: batchnorm.BatchNorm1d,
    nn.BatchNorm2d: batchnorm.BatchNorm2d,
    nn.BatchNorm3d: batchnorm.BatchNorm3d,
}
MODULES = [info for info in module_db if info.module_cls in OURS]
OPERATORS = [info for info in op_db if info.name == "nn.functional.batch_norm"]


def module_cases():
    for info in MODULES:
        for dtype in (torch.float32, torch.float64):
            for training in (True, False):
                inputs = info.module_inputs_func(info, "cpu", dtype, True, training)
                for number, case in enumerate(inputs):
                    yield pytest.param(info, dtype, training, case, id=f"{info.name}-{dtype}-{training}-{number}")


@pytest.mark.parametrize(("info", "dtype", "training", "case"), list(module_cases()))
def test_module_db(info, dtype, training, case):
    build, call = case.constructor_input, case.forward_input
    torch.manual_seed(1)
    theirs = info.module_cls(*build.args, **build.kwargs, dtype=dtype).train(training)
    ours = OURS[info.module_cls](*build.args, **build.kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for module in (ours, theirs):
        args = [a.detach().clone().requires_grad_(a.requires_grad) for a in call.args]
        out = module(*args, **call.kwargs)
        torch.manual_seed(2)
        g = torch.randn_like(out)
        wanted = [*args, *module.parameters()]
        results.append((out, *torch.autograd.grad(out, wanted, g), *module.buffers()))
    # torch's gradient for one sample in channels_last strides is wrong in 2.13: none of these cases is such a one
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-5)


def error_cases():
    """In training only: torch's own layers do not raise them in evaluation."""
    for info in MODULES:
        for number, case in enumerate(info.module_error_inputs_func(info, "cpu", torch.float32, False, True)):
            yield pytest.param(info, case, id=f"{info.name}-{number}")


@pytest.mark.parametrize(("info", "case"), list(error_cases()))
def test_module_error_inputs(info, case):
    build, call = case.module_error_input.constructor_input, case.module_error_input.forward_input
    module = OURS[info.module_cls](*build.args, **build.kwargs)
    with pytest.raises(case.error_type, match=case.error_regex):
        module(*call.args, **call.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.variant_test_name or "plain")
def test_opinfo_samples(info, dtype):
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        mine = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in sample.args]
        theirs = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in sample.args]
        x = sample.input
        a = batch_norm(x, *mine, **sample.kwargs)
        b = info.op(x, *theirs, **sample.kwargs)
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype.itemsize >= 4 else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(a, b, **tolerance)
        torch.testing.assert_close(mine[:2], theirs[:2], **tolerance)
        if x.requires_grad and dtype.itemsize >= 4 and a.numel():
            g = torch.randn_like(a)
            torch.testing.assert_close(torch.autograd.grad(a, x, g), torch.autograd.grad(b, x, g), rtol=1e-3, atol=1e-3)
        count += 1
    assert count > 5


@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.variant_test_name or "plain")
def test_opinfo_error_inputs(info):
    if info.error_inputs_func is None:
        return
    for case in info.error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises(case.error_type):
            batch_norm(sample.input, *sample.args, **sample.kwargs)
