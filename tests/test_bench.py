"""The bench: what it times is right, its rows are complete, its mistakes are sentences."""

import json

import pytest
import torch
from torch import nn

from batchnorm import bench
from batchnorm.bench import layer_bench, model_step
from batchnorm.cli import main
from batchnorm.errors import UserError


def test_rows_are_complete_and_json(capsys):
    seen = []
    result = bench.bench("4x8x6x6,6x5", "float32,bfloat16", cases="bn,bn+add+relu", seconds=0.01, progress=seen.append)
    assert len(result["rows"]) == len(seen) == 2 * 2 * (2 + 1)  # (N, C) has one layout
    for row in json.loads(json.dumps(result))["rows"]:
        for part in ("forward", "both"):
            assert row[part]["speedup"] > 0
            times = row[part]["seconds"]["ours"]
            assert times["p20"] <= times["p50"] <= times["p80"]
        assert ("speedup_in_place" in row["both"]) == ("relu" in row["case"])
    assert set(result["means"]) == {f"{c} {d}" for c in ("bn", "bn+add+relu") for d in ("float32", "bfloat16")}
    assert bench.show(result).row_count == len(result["rows"]) + len(result["means"])


def test_contenders_take_turns():
    order = []
    bench.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, least=3)
    assert order == ["a", "b"] * 4


@pytest.mark.parametrize("layout", bench.LAYOUTS)
@pytest.mark.parametrize("case", bench.CASES)
def test_wrong_values_are_never_timed(case, layout, monkeypatch):
    problem = bench.Problem((4, 3, 5, 5), "float32", layout, case)
    assert bench.check_values(problem, "cpu") < 1e-6

    class Wrong(bench.layer_bench.BatchNormAct2d):
        def forward(self, input, residual=None, mask=None, domain=None):
            return super().forward(input, residual) * (1 + 1e-4)

    monkeypatch.setattr(layer_bench, "BatchNormAct2d", Wrong)
    with pytest.raises(AssertionError, match="relative error"):
        bench.check_values(problem, "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"shapes": "8xx3"},
        {"shapes": "8"},
        {"shapes": "0x3"},
        {"dtypes": "int8"},
        {"layouts": "nhwc"},
        {"cases": "bn+gelu"},
        {"device": "tpu"},
        {"seconds": 0},
        {"threads": 0},
    ],
)
def test_mistakes_are_sentences(options):
    with pytest.raises(UserError, match=rf"\({next(iter(options))}="):
        bench.bench(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="no CUDA device"):
        bench.bench(device="cuda")


def test_evaluation_is_timed_apart():
    result = bench.evaluation(bench.Problem((4, 3, 5, 5), "float32", "channels_last", "bn+relu"), seconds=0.01)
    assert set(result) == {"speedup", "copies"}


@pytest.mark.parametrize("layout", bench.LAYOUTS)
def test_a_whole_training_step(layout):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    result = model_step(net, torch.randn(4, 3, 6, 6), 0.01, layout)
    assert result["layers"] == 1
    assert result["speedup"] > 0
    read, given = 4 * 4 * 4 * 4 * 4, 4 * 64 * 4  # what the normalization reads; what ReLU and Linear keep
    kept = result["memory"]
    assert {kind: memory["normalizations"] for kind, memory in kept.items()} == dict.fromkeys(kept, read)
    assert kept["torch"]["others"] >= given
    if layout == "contiguous":  # else Flatten copies
        assert kept["save_memory"]["others"] <= kept["ours"]["others"] - given + 200  # some vectors a channel
    assert all(memory["peak"] >= memory["normalizations"] + memory["others"] for memory in kept.values())
    with pytest.raises(UserError, match="no batch normalization"):
        model_step(nn.Linear(2, 2), torch.randn(3, 2), 0.01)
    with pytest.raises(UserError, match="raises on its example"):
        model_step(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.randn(3, 5), 0.01)


FACTORY = """
import torch
from torch import nn
def good():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(8, 4)
def nothing():
    return None
def broken():
    raise ValueError("no such weights")
"""


def run(capsys, *arguments):
    code = main(["bench", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(capsys):
    code, out, err = run(capsys, "--shapes", "6x5", "--seconds", "0.01", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["rows"][0]["shape"] == [6, 5]
    code, out, _ = run(capsys, "--shapes", "6x5", "--seconds", "0.01")
    assert code == 0
    assert "mean" in out


def test_the_command_with_a_model(capsys, tmp_path, monkeypatch):
    (tmp_path / "their_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run(capsys, "--model", "their_nets:good", "--seconds", "0.01", "--layouts", "contiguous")
    assert code == 0
    assert "training step of their_nets:good" in out
    assert "kept after the forward by normalizations" in out
    for name in ("nothing", "broken", "absent"):
        code, out, err = run(capsys, "--model", f"their_nets:{name}")
        assert (code, out) == (2, "")
        assert err.startswith("batchnorm: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--shapes", "8"), ("--dtypes", "int8"), ("--device", "tpu"), ("--nonsense",)])
def test_the_commands_mistakes_are_one_line(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("batchnorm: ")
    assert err.count("\n") == 1


def test_a_wrong_value_is_exit_code_1(capsys, monkeypatch):
    def wrong(*_):
        raise AssertionError("relative error 1")

    monkeypatch.setattr(layer_bench, "check_values", wrong)
    code, out, err = run(capsys, "--shapes", "6x5")
    assert (code, out) == (1, "")
    assert "nothing was timed" in err
