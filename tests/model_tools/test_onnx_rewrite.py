"""What a fold writes: every form of pair, IR version, opset and type, held against float64 and the standard."""

import ml_dtypes
import numpy as np
import onnx
import onnx.version_converter
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from batchnorm.model_tools import fold_onnx
from tests.fuzz.targets import fold_onnx as fuzzed
from tests.onnx_nets import RNG, check, model_of, norm, run, save, tensor

node = helper.make_node


def constant(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


# --- forms of pairs: (nodes after and before, initializers, shape of x, output) --------------------------
def linear(name, source, out, held, *, how, bias):
    """A linear layer on axis 1 of a matrix, by one of the ways in which exporters write it."""
    wide = {"x": 5}.get(source, 6)
    flipped = how == "gemm-t"
    held.append(tensor(f"{name}.w", *((out, wide) if flipped else (wide, out))))
    held.append(tensor(f"{name}.b", *((1, out) if bias == "row" else (out,))))
    inputs = [source, f"{name}.w"]
    if how.startswith("gemm"):
        scales = {"alpha": 0.5, "beta": 2.0} if how == "gemm-scaled" else {}
        return [
            node(
                "Gemm",
                [*inputs, f"{name}.b"][: 2 + bool(bias)],
                [f"{name}.y"],
                name=name,
                transB=int(flipped),
                **scales,
            )
        ]
    product = node("MatMul", inputs, [f"{name}.p" if bias else f"{name}.y"], name=name)
    if not bias:
        return [product]
    operands = [f"{name}.b", f"{name}.p"] if bias == "first" else [f"{name}.p", f"{name}.b"]
    return [product, node("Sub" if bias == "sub" else "Add", operands, [f"{name}.y"])]


@pytest.mark.parametrize("how", ["gemm", "gemm-t", "gemm-scaled", "matmul"])
@pytest.mark.parametrize("bias", ["", "add", "sub", "first", "row"])
@pytest.mark.parametrize("opset", [9, 17])
def test_linear_layers_before_and_after(tmp_path, how, bias, opset):
    held = []
    if how != "matmul" and opset == 9:
        bias = bias or "add"  # Gemm had to have one
    first, weights = norm("first", "a.y", 6)
    second, more = norm("second", "r", 6)
    nodes = [
        *linear("a", "x", 6, held, how=how, bias=bias), first, node("Relu", ["first.out"], ["r"]), second,
        *linear("b", "second.out", 4, held, how=how, bias=bias),
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*weights, *more, *held], [3, 5], ["b.y"], opset=opset)
    check(path, tmp_path, (3, 5), {"first": "a", "second": "b"})


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1, 1, 1), (1,)])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_a_constant_added_to_each_channel_is_bias(tmp_path, shape, kind):
    first, weights = norm("bn", "a", 6)
    nodes = [node(kind, ["x", "w"], ["c"], name="conv"), node("Add", ["c", "k"], ["a"]), first]
    held = [tensor("w", *((6, 4) if kind == "Conv" else (4, 6)), 3, 3), tensor("k", *shape)]
    path = save(tmp_path / "n.onnx", nodes, [*weights, *held], [2, 4, 5, 5], ["bn.out"])
    check(path, tmp_path, (2, 4, 5, 5), {"bn": "conv"})
    assert [n.op_type for n in onnx.load(str(tmp_path / "folded.onnx")).graph.node] == [kind]


@pytest.mark.parametrize("shape", [(3, 3), (6, 3, 3), (2, 6, 1, 1)])
def test_a_constant_that_differs_by_position_is_not(tmp_path, shape):
    first, weights = norm("bn", "a", 6)
    nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), node("Add", ["c", "k"], ["a"]), first]
    held = [tensor("w", 6, 4, 3, 3), tensor("k", *shape)]
    path = save(tmp_path / "n.onnx", nodes, [*weights, *held], [2, 4, 5, 5], ["bn.out"])
    check(path, tmp_path, (2, 4, 5, 5), {"bn": None})


def test_an_addition_of_opset_6_says_its_axis(tmp_path):
    """Its last axis is as long, so an evaluator that ignores the attribute would not notice."""
    first, weights = norm("bn", "a", 4, is_test=1)
    added = node("Add", ["c", "k"], ["a"], broadcast=1, axis=1)
    held = [tensor("w", 4, 4, 2, 2), tensor("k", 4)]
    nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), added, first]
    path = save(tmp_path / "n.onnx", nodes, [*weights, *held], [2, 4, 5, 5], ["bn.out"], opset=6, ir=3)
    report = fold_onnx(path, tmp_path / "folded.onnx")
    folded = onnx.load(str(tmp_path / "folded.onnx"))
    assert [n.op_type for n in folded.graph.node] == ["Conv"]
    assert [entry.into for entry in report.entries] == ["conv"]
    scale, shift, mean, var, bias = (numpy_helper.to_array(t).astype(float) for t in (*weights, held[1]))
    want = (bias - mean) * scale / np.sqrt(var + 1e-5) + shift
    np.testing.assert_allclose(numpy_helper.to_array(folded.graph.initializer[1]), want, rtol=1e-5, atol=1e-6)


def old_layers():
    """By opset 6: a broadcast says so; test mode is an attribute."""
    matmul, gemm = (norm(name, f"{name}.in", 4, is_test=1) for name in ("matmul.n", "gemm.n"))
    yield "matmul", [
        node("MatMul", ["x", "w"], ["matmul.n.in"], name="matmul"), matmul[0],
    ], [*matmul[1], tensor("w", 3, 4)]  # fmt: skip
    yield "gemm", [
        node("Gemm", ["x", "w", "k"], ["gemm.n.in"], name="gemm", broadcast=1), gemm[0],
    ], [*gemm[1], tensor("w", 3, 4), tensor("k", 1, 4)]  # fmt: skip


@pytest.mark.parametrize(("name", "nodes", "held"), list(old_layers()))
def test_opset_6(tmp_path, name, nodes, held):
    """No evaluator follows it, so both files are compared in opset 8."""
    old, new = tmp_path / "n.onnx", tmp_path / "folded.onnx"
    save(old, nodes, held, [2, 3], [f"{name}.n.out"], opset=6, ir=3)
    onnx.checker.check_model(str(old), full_check=True)
    report = fold_onnx(old, new)
    assert [entry.into for entry in report.entries] == [name]
    assert not report.verified
    assert "the file has 6" in str(report).splitlines()[0]
    onnx.checker.check_model(str(new), full_check=True)
    later = [onnx.version_converter.convert_version(onnx.load(str(path)), 8) for path in (old, new)]
    for number, model in enumerate(later):
        onnx.save(model, str(tmp_path / f"{number}.onnx"))
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    theirs, ours = (run(tmp_path / f"{number}.onnx", x=x)[0] for number in range(2))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


WAYS = {  # from channels on axis 1 of [2, 4, 3, 5] to the 60 features of a matrix
    "flatten": [node("Flatten", ["v"], ["f"])],
    "reshape": [node("Reshape", ["v", "flat"], ["f"])],
    "last": [node("Transpose", ["v"], ["t"], perm=[0, 2, 3, 1]), node("Reshape", ["t", "flat"], ["f"])],
    "shape": [
        node("Shape", ["v"], ["s"]), node("Gather", ["s", "zero"], ["n"]),
        node("Concat", ["n", "minus"], ["to"], axis=0), node("Reshape", ["v", "to"], ["f"]),
    ],
    "dropout": [node("Identity", ["v"], ["i"]), node("Dropout", ["i"], ["d"]), node("Flatten", ["d"], ["f"])],
    "unsqueeze": [node("Unsqueeze", ["v", "minus"], ["u"]), node("Flatten", ["u"], ["f"])],
}  # fmt: skip
SHAPES = [constant("flat", [2, -1]), constant("zero", [0]), constant("minus", [-1])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
@pytest.mark.parametrize("batch", [2, "batch"])
def test_channels_become_features(tmp_path, way, kind, batch):
    first, weights = norm("bn", "x", 4)
    first.output[0] = "v"
    nodes = [first, *WAYS[way], node(kind, ["f", "w"], ["y"], name="fc")]
    path = save(tmp_path / "n.onnx", nodes, [*weights, *SHAPES, tensor("w", 60, 7)], [batch, 4, 3, 5], ["y"], rank=2)
    check(path, tmp_path, (2, 4, 3, 5), {"bn": "fc"})


def test_channels_in_another_order_go_into_the_layer_before(tmp_path):
    first, weights = norm("bn", "s", 6)
    shuffle = [
        node("Reshape", ["c", "apart"], ["r"]), node("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3]),
        node("Reshape", ["t", "together"], ["s"]),
    ]  # fmt: skip
    held = [tensor("w", 6, 3, 2), constant("apart", [2, 2, 3, -1]), constant("together", [2, 6, -1])]
    path = save(
        tmp_path / "n.onnx", [node("Conv", ["x", "w"], ["c"], name="conv"), *shuffle, first], [*weights, *held],
        [2, 3, 6], ["bn.out"],
    )  # fmt: skip
    check(path, tmp_path, (2, 3, 6), {"bn": "conv"})


@pytest.mark.parametrize(("perm", "into"), [([0, 2, 1], "fc"), (None, None)])
def test_tokens_have_their_channels_on_the_last_axis(tmp_path, perm, into):
    """Without the transposition the normalization takes the tokens for channels, of which there are as many here."""
    first, weights = norm("bn", "t", 6)
    between = node("Transpose", ["m"], ["t"], perm=perm) if perm else node("Identity", ["m"], ["t"])
    nodes = [node("MatMul", ["x", "w"], ["m"], name="fc"), between, first]
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 5, 6)], [2, 6, 5], ["bn.out"])
    check(path, tmp_path, (2, 6, 5), {"bn": into})


def test_two_layers_read_one_normalization(tmp_path):
    first, weights = norm("bn", "x", 4)
    nodes = [
        first, node("Conv", ["bn.out", "w"], ["a"], name="a"), node("Conv", ["bn.out", "w"], ["b"], name="b"),
        node("Add", ["a", "b"], ["y"]),
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], ["y"])
    check(path, tmp_path, (2, 4, 3, 3), {"bn": "a, b"})


@pytest.mark.parametrize("attributes", [{"pads": [1, 0, 2, 1]}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"}])
@pytest.mark.parametrize("kernel", [1, 3])
def test_padding_matters_only_after(tmp_path, attributes, kernel):
    first, weights = norm("first", "c", 4)
    second, more = norm("second", "r", 4)
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="a", **attributes), first, node("Relu", ["first.out"], ["r"]), second,
        node("Conv", ["second.out", "w"], ["y"], name="b", **attributes),
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*weights, *more, tensor("w", 4, 4, kernel, kernel)], [2, 4, 7, 8], ["y"])
    padded = "pads" in attributes or (kernel == 3 and attributes["auto_pad"] != "VALID")
    check(path, tmp_path, (2, 4, 7, 8), {"first": "a", "second": None if padded else "b"})


# --- versions and types --------------------------------------------------------------------------------
@pytest.mark.parametrize("ir", [3, 4, 10])
def test_initializers_are_inputs_where_the_version_wants_it(tmp_path, ir):
    first, weights = norm("bn", "c", 4)
    nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), first, node("Relu", ["bn.out"], ["y"])]
    path = save(tmp_path / "n.onnx", nodes, [*weights, tensor("w", 4, 4, 1, 1)], [2, 4, 3, 3], ["y"], opset=8, ir=ir)
    check(path, tmp_path, (2, 4, 3, 3), {"bn": "conv"})
    graph = onnx.load(str(tmp_path / "folded.onnx")).graph
    held = {t.name for t in graph.initializer}
    assert len(held) == 2
    assert {value.name for value in graph.input} == {"x"} | (held if ir == 3 else set())


@pytest.mark.parametrize("name", ["w", "bn.mean"])
def test_an_initializer_that_a_caller_may_override_is_no_constant(tmp_path, name):
    first, weights = norm("bn", "c", 4)
    held = [*weights, tensor("w", 4, 4, 1, 1)]
    model = model_of([node("Conv", ["x", "w"], ["c"], name="conv"), first], held, [2, 4, 3, 3], ["bn.out"], ir=4)
    dims = next(t for t in held if t.name == name).dims
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    onnx.save(model, str(tmp_path / "n.onnx"))
    report = check(tmp_path / "n.onnx", tmp_path, (2, 4, 3, 3), {"bn": None})
    assert f"{name} is an input of the graph too, so a caller may override it" in report.stayed[0].reason
    assert {value.name for value in onnx.load(str(tmp_path / "folded.onnx")).graph.input} == {"x", name}


TYPES = {np.float16: 1e-2, np.float32: 1e-5, np.float64: 1e-12, ml_dtypes.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_each_type_by_its_own_tolerance(tmp_path, dtype, kind):
    first, weights = norm("bn", "c", 8, dtype=dtype)
    held = tensor("w", *((8, 8, 3) if kind == "Conv" else (8, 8)), dtype=dtype)
    shape = [2, 8, 7] if kind == "Conv" else [5, 8]
    path = save(
        tmp_path / "n.onnx", [node(kind, ["x", "w"], ["c"], name="layer"), first], [*weights, held], shape, ["bn.out"],
        kind=held.data_type, opset=22,
    )  # fmt: skip
    check(path, tmp_path, shape, {"bn": "layer"}, TYPES[dtype])
    folded = onnx.load(str(tmp_path / "folded.onnx")).graph.initializer
    assert {t.data_type for t in folded} == {held.data_type}
    w, scale, var = (numpy_helper.to_array(t).astype(np.float64) for t in (held, weights[0], weights[3]))
    s = scale / np.sqrt(var + np.float32(1e-5))
    want = (w * s.reshape((-1, 1, 1) if kind == "Conv" else (1, -1))).astype(np.float64)
    # One rounding, to the nearest.
    np.testing.assert_array_equal(numpy_helper.to_array(folded[0]), want.astype(dtype))


def test_mixed_types_keep_the_layers(tmp_path):
    first, weights = norm("bn", "c", 4)
    held = tensor("w", 4, 4, 3, dtype=np.float16)
    nodes = [node("Conv", ["x", "w"], ["c"], name="conv"), first]
    path = save(tmp_path / "n.onnx", nodes, [*weights, held], [2, 4, 7], ["bn.out"], kind=TensorProto.FLOAT16)
    report = fold_onnx(path, tmp_path / "folded.onnx")
    assert [entry.into for entry in report.entries] == ["conv"]
    assert report.verified
    assert {t.data_type for t in onnx.load(str(tmp_path / "folded.onnx")).graph.initializer} == {TensorProto.FLOAT16}


def test_a_fold_that_overflows_is_taken_back_and_the_others_stay_folded(tmp_path):
    (one, a), (two, b) = norm("one", "c", 4, dtype=np.float16), norm("two", "d", 4, dtype=np.float16)
    b[0] = constant("two.scale", np.full(4, 6e4, np.float16))
    b[3] = constant("two.var", np.full(4, 6e4, np.float16))
    b[2] = constant("two.mean", np.full(4, 0, np.float16))
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="conv"), one, node("Mul", ["one.out", "tiny"], ["m"]),
        node("Conv", ["m", "big"], ["d"], name="last"), two,
    ]  # fmt: skip
    held = [
        tensor("w", 4, 4, 1, dtype=np.float16), constant("big", np.full((4, 4, 1), 3e3, np.float16)),
        constant("tiny", np.float16(1e-4)),
    ]  # fmt: skip
    path = save(tmp_path / "n.onnx", nodes, [*a, *b, *held], [2, 4, 5], ["two.out"], kind=TensorProto.FLOAT16)
    report = fold_onnx(path, tmp_path / "folded.onnx")
    assert {entry.norm: entry.into for entry in report.entries} == {"one": "conv", "two": None}
    assert "more than the tolerance" in report.stayed[0].reason
    assert report.difference < 1e-2


# --- any of them, one after the other --------------------------------------------------------------------
STEPS = ["norm", "conv", "conv-pad", "add", "relu", "identity", "shuffle", "matmul", "up", "split"]


def grow(steps):
    """A graph of these steps on [2, 4, 6]; every value keeps that shape, but for convolutions that shorten it."""
    value, nodes, held, norms, length = "x", [], [constant("swap", [2, 4, -1]), constant("two", [2, 2, 2, -1])], [], 9
    for number, step in enumerate(steps):
        name, result = f"{step}{number}", f"v{number}"
        if step == "norm":
            made, weights = norm(name, value, 4)
            made.output[0] = result
            nodes, held, norms = [*nodes, made], [*held, *weights], [*norms, name]
        elif step in ("conv", "conv-pad", "up"):
            kernel, pads = (3, 1) if step == "conv-pad" else (2 if step == "conv" else 1, 0)
            length += 2 * pads - kernel + 1
            held.append(tensor(f"{name}.w", 4, 2, kernel))
            kind = "ConvTranspose" if step == "up" else "Conv"
            nodes.append(node(kind, [value, f"{name}.w"], [result], name=name, group=2, pads=[pads, pads]))
        elif step == "add":
            held.append(tensor(f"{name}.k", 4, 1))
            nodes.append(node("Add", [value, f"{name}.k"], [result], name=name))
        elif step == "shuffle":
            nodes += [
                node("Reshape", [value, "two"], [f"{result}a"]),
                node("Transpose", [f"{result}a"], [f"{result}b"], perm=[0, 2, 1, 3]),
                node("Reshape", [f"{result}b", "swap"], [result]),
            ]
        elif step == "matmul":
            held.append(tensor(f"{name}.w", length, length))
            nodes.append(node("MatMul", [value, f"{name}.w"], [result], name=name))
        elif step == "split":
            nodes += [node("Relu", [value], [f"{result}a"]), node("Add", [value, f"{result}a"], [result], name=name)]
        else:
            nodes.append(node("Relu" if step == "relu" else "Identity", [value], [result], name=name))
        value = result
    return [*nodes, node("Identity", [value], ["y"])], held, norms


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(STEPS), min_size=2, max_size=7).filter(lambda steps: steps.count("conv") < 7))
def test_any_chain_computes_the_same_and_keeps_to_the_standard(tmp_path, steps):
    nodes, held, norms = grow([*steps, "norm"])
    path = save(tmp_path / "n.onnx", nodes, held, [2, 4, 9], ["y"])
    report = fold_onnx(path, tmp_path / "folded.onnx")
    assert sorted(entry.norm for entry in report.entries) == sorted(norms)
    onnx.checker.check_model(str(tmp_path / "folded.onnx"), full_check=True)
    kept = [n.name for n in onnx.load(str(tmp_path / "folded.onnx")).graph.node if n.op_type == "BatchNormalization"]
    assert kept == [entry.norm for entry in report.stayed]
    assert not any("tolerance" in entry.reason for entry in report.stayed), str(report)
    x = RNG.standard_normal((2, 4, 9)).astype(np.float32)
    ours, theirs = (run(p, x=x)[0] for p in (tmp_path / "folded.onnx", path))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_two_biases_of_one_matmul_have_names_of_their_own():
    """onnxruntime refuses two nodes of one name; found by the fuzzer."""
    Node, vector = fuzzed.Node, ((2,), (2,), (2,), (2,))
    rest = {"attributes": (), "via": "initializer", "named": True}
    nodes = (
        Node(op="BatchNormalization", reads=(0,), parameters=vector, **rest),
        Node(op="MatMul", reads=(1,), parameters=((2, 1),), **rest),
        Node(op="BatchNormalization", reads=(2,), parameters=((1,), (1,), (1,), (1,)), **rest),
        Node(op="Relu", reads=(3,), parameters=(), **rest),
    )
    fuzzed.check(fuzzed.Graph(nodes, (1, 2), (4,), (8, 17), "float32", 0))
