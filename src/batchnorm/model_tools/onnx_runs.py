"""The same inputs through two ONNX files, in onnxruntime or, where it cannot, in onnx's own evaluator."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, quote_error
from ..inspect.onnx_layers import is_floating
from ..inspect.onnx_scope import scopes_of

__all__ = ["NotRun", "Runs", "import_or_say"]

_FIRST_OPSET = 7  # onnxruntime loads older files and takes their operators for later ones
# For axes without a fixed size, tried in turn: (that of the first axis, that of the others).
_SIZES = [(batch, size) for batch in (2, 1) for size in (2, 8, 32, 64, 224)]


class NotRun(Exception):
    """A file cannot be run; the message says why, in one line."""


def import_or_say(name: str) -> Any:
    """A module, or one sentence on how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"fold_onnx needs {name}, which is not installed; pip install {name}") from None


class Runs:
    """Inputs that the file takes, and its floating outputs on them: `reference`."""

    def __init__(self, path: Path, model: Any, given: Any) -> None:
        opset = scopes_of(model)[0].opset
        if opset < _FIRST_OPSET:
            raise NotRun(f"the evaluators follow operators of opset {_FIRST_OPSET} and later, and the file has {opset}")
        self.run, self.evaluator = _runner(path)
        if given is not None:
            self.inputs = _named(model, given)
            self.reference = self._given(path)
        else:
            self.inputs, self.reference = self._drawn(model)
        if not any(output.numel() for output in self.reference):
            raise NotRun("the model has no output of floating numbers")

    def _given(self, path: Path) -> list[Tensor]:
        try:
            return _floats(self.run(self.inputs))
        except Exception as error:  # the evaluators raise what they like
            raise UserError(
                f"fold_onnx: {path} does not run in {self.evaluator}: {quote_error(error)}; give example_inputs that "
                "fit"
            ) from error

    def _drawn(self, model: Any) -> tuple[dict[str, Any], list[Tensor]]:
        first: Exception | None = None
        seen = []
        for inputs in _draws(model):
            shapes = {name: array.shape for name, array in inputs.items()}
            if shapes in seen:
                continue
            seen.append(shapes)
            try:
                return inputs, _floats(self.run(inputs))
            except Exception as error:  # see above; the next sizes may fit
                first = first or error
        assert first is not None  # there is at least one draw
        raise NotRun(f"it does not run on random inputs: {quote_error(first)}; give example_inputs") from first

    def outputs(self, path: Path) -> list[Tensor]:
        """The outputs of another file on the same inputs."""
        return _floats(_runner(path)[0](self.inputs))


def _runner(path: Path) -> tuple[Callable[[dict[str, Any]], list[Any]], str]:
    """A function from inputs to outputs, and the name of what runs it."""
    try:
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would fold by itself
        options.log_severity_level = 4
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs), "onnxruntime"
    except Exception as first:  # not installed, an operator or a type that it lacks
        try:
            from onnx.reference import ReferenceEvaluator

            evaluator = ReferenceEvaluator(str(path))
        except Exception as error:
            raise NotRun(f"no evaluator takes the model: {quote_error(first)}") from error
        return lambda inputs: list(evaluator.run(None, inputs)), "onnx's reference evaluator"


def _floats(outputs: list[Any]) -> list[Tensor]:
    import numpy as np

    arrays = [output for output in outputs if isinstance(output, np.ndarray) and is_floating(output.dtype)]
    return [torch.from_numpy(array.astype(np.float64)) for array in arrays]


def _wanted(model: Any) -> list[Any]:
    initial = {tensor.name for tensor in model.graph.initializer}
    initial |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return [value for value in model.graph.input if value.name not in initial]


def _named(model: Any, given: Any) -> dict[str, Any]:
    import numpy as np

    if isinstance(given, dict):
        return given
    wanted = _wanted(model)
    arrays = given if isinstance(given, tuple) else (given,)
    if len(arrays) != len(wanted):
        raise UserError(f"fold_onnx: the graph takes {len(wanted)} inputs and {len(arrays)} were given; give all")
    return {value.name: np.asarray(array) for value, array in zip(wanted, arrays, strict=True)}


def _draws(model: Any) -> Iterator[dict[str, Any]]:
    import numpy as np

    for batch, size in _SIZES:
        named: dict[str, int] = {}
        generator = np.random.default_rng(0)
        yield {value.name: _draw(value, batch, size, named, generator) for value in _wanted(model)}


def _draw(value: Any, batch: int, size: int, named: dict[str, int], generator: Any) -> Any:
    from onnx import helper

    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise NotRun(f"the input {value.name} is no tensor of a given number of axes; give example_inputs")
    shape = []
    for number, dim in enumerate(kind.shape.dim):
        free = batch if number == 0 else size
        shape.append(dim.dim_value or (named.setdefault(dim.dim_param, free) if dim.dim_param else free))
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if is_floating(dtype):
        return generator.standard_normal(shape).astype(dtype)
    if dtype.kind in "iub":
        return generator.integers(0, 2, shape).astype(dtype)
    raise NotRun(f"the input {value.name} holds no numbers; give example_inputs")
