"""`fold_onnx`: a valid file that onnxruntime answers as before, on inputs that it was not verified on."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import batchnorm
from batchnorm.errors import UserError
from batchnorm.inspect.modules import is_norm

from ..compare import Discard, Make, Mismatch, Refused, quiet
from ..layers import FUNCTIONS, Scope
from ..onnx_graphs import Graph, Node, build, graphs
from ..program import Case
from ..strategies import programs

__all__ = ["CASES", "Graph", "Node", "check"]

_EXPORTED = tuple(f for f in FUNCTIONS if "if" not in f and "detach" not in f)
SCOPE = Scope(training=False, ours=True, functions=_EXPORTED, dtypes=("float32",))
_EXPORTS = st.builds(
    lambda program, folding: Case("fold_onnx", program, None, (("constant_folding", folding),)),
    programs(SCOPE), st.booleans(),
)  # fmt: skip
_GRAPHS = graphs().map(lambda graph: Case("fold_onnx", problem=graph))
CASES = st.one_of(_GRAPHS, _GRAPHS, _EXPORTS)
_TOLERANCE = {"float32": 5e-4, "float16": 5e-2, "float64": 1e-9}


def check(given: Graph | Make, *, constant_folding: bool = True) -> None:
    import onnx

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder, "source.onnx"), Path(folder, "target.onnx")
        try:
            if isinstance(given, Graph):
                onnx.save(build(given), str(source))
            else:
                _export(given, source, constant_folding)
            onnx.checker.check_model(str(source), full_check=True)
            inputs = _inputs(source)
            before = [_run(source, x) for x in inputs]
        except Exception as error:
            raise Discard(f"{type(error).__name__}: {error}") from error
        held = source.read_bytes()
        try:
            report = batchnorm.fold_onnx(source, target)
        except UserError as error:
            if "please report" in str(error) or target.exists():
                raise Mismatch(str(error)) from error
            raise Refused(str(error)) from error
        if source.read_bytes() != held:
            raise Mismatch("the source was written to")
        onnx.checker.check_model(str(target), full_check=True)
        _check_report(onnx.load(str(target)), report)
        for x, want in zip(inputs, before, strict=True):
            for optimized in (False, True):
                _compare(_run(target, x, optimized), want)


def _export(make: Make, path: Path, constant_folding: bool) -> None:
    model, x = make()
    model.eval()
    if any(is_norm(m) and m.running_mean is None and getattr(m, "ghost_batch_size", None) for m in model.modules()):
        raise Discard("statistics of slices in evaluation: the exporter has no copy")
    with _silent():
        torch.onnx.export(
            model, (x,), str(path), dynamo=False, do_constant_folding=constant_folding, opset_version=17,
            training=torch.onnx.TrainingMode.PRESERVE,  # else the exporter folds by itself
        )  # fmt: skip


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter prints its whole graph from C++ where it fails."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _inputs(path: Path) -> list[dict[str, Any]]:
    import numpy as np
    import onnx

    graph = onnx.load(str(path)).graph
    initial = {tensor.name for tensor in graph.initializer}
    generator = np.random.default_rng(5)
    drawn = []
    for scale in (1.0, -3.0):
        values = {}
        for value in graph.input:
            if value.name not in initial:
                kind = value.type.tensor_type
                dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
                shape = [axis.dim_value for axis in kind.shape.dim]
                values[value.name] = (generator.standard_normal(shape) * scale).astype(dtype)
        drawn.append(values)
    return drawn


def _run(path: Path, inputs: dict[str, Any], optimized: bool = False) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def _check_report(model: Any, report: Any) -> None:
    kept = [node.name or node.output[0] for node in model.graph.node if node.op_type == "BatchNormalization"]
    said = [entry.norm for entry in report.stayed]
    if sorted(kept) != sorted(said):
        raise Mismatch(f"the report says that {said} stayed, and the file holds {kept}")
    if any(not entry.reason for entry in report.entries):
        raise Mismatch("the report gives no reason")


def _compare(found: list[Any], want: list[Any]) -> None:
    import numpy as np

    for ours, theirs in zip(found, want, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise Mismatch(f"an output is {ours.dtype} {ours.shape}, and was {theirs.dtype} {theirs.shape}")
        exact = theirs.astype(np.float64)
        if not np.isfinite(exact).all():
            raise Discard("not finite")
        scale = np.abs(exact).max(initial=0.0) or 1.0
        off = np.abs(ours.astype(np.float64) - exact).max(initial=0.0) / scale
        if not off <= _TOLERANCE[str(theirs.dtype)]:
            raise Mismatch(f"an output is off by {off:.2g} of the largest value")
