"""The command: exit codes, formats, and one line for each mistake."""

import json

import pytest
import torch

from batchnorm.cli import main
from batchnorm.doctor.rules import all_rules

MODULE = """
import torch
from torch import nn

def net(bias=False, **bn):
    return nn.Sequential(nn.Linear(8, 16, bias=bias), nn.BatchNorm1d(16, **bn), nn.ReLU(), nn.Linear(16, 3))

def fine(): return net()
def biased(): return net(bias=True)
def untrained(): return net().eval(), [torch.randn(64, 8) for _ in range(20)]
def with_batches(): return net(), [torch.randn(64, 8)]
def wrong_batches(): return net(), [torch.randn(64, 9)]
def batches(): return [torch.randn(64, 8)]
def raises(): raise RuntimeError("first line\\nsecond line")
def number(): return 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doctor_nets.py").write_text(MODULE)
    (tmp_path / "doctor_broken.py").write_text("import nothing_of_this_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(capsys, *arguments):
    code = main(["doctor", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        (["doctor_nets:fine"], 0, "no findings"),
        (["doctor_nets:biased"], 1, "BN101"),
        (["doctor_nets:biased", "--ignore", "BN101"], 0, "no findings"),
        (["doctor_nets:biased", "--select", "BN2"], 0, "no findings"),
        (["doctor_nets:untrained"], 1, "BN106"),
        (["doctor_nets:with_batches"], 0, "no findings"),
        (["doctor_nets:fine", "--data", "doctor_nets:batches", "--steps", "9"], 1, "BN303"),
        (["--explain", "bn202"], 0, "# BN202 train-eval-gap"),
    ],
)
def test_exit_codes(capsys, arguments, code, found):
    got, out, err = run(capsys, *arguments)
    assert (got, err) == (code, "")
    assert found in out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["doctor_nets:nothing"],
        ["doctor_broken:net"],
        ["not_there:net"],
        ["doctor_nets"],
        ["doctor_nets:raises"],
        ["doctor_nets:number"],
        ["doctor_nets:wrong_batches"],
        ["doctor_nets:fine", "--select", "XX"],
        ["doctor_nets:fine", "--steps", "0"],
        ["doctor_nets:fine", "--steps", "many"],
        ["doctor_nets:fine", "--batch-size", "0"],
        ["doctor_nets:fine", "--data", "nothing.npz"],
        ["doctor_nets:fine", "--state", "nothing.pt"],
        ["doctor_nets:fine", "--json", "--sarif"],
        ["doctor_nets:fine", "--fix", "--out", "doctor_nets.py"],
        ["doctor_nets:fine", "--nothing"],
        ["nothing.onnx"],
        ["nothing.pt2"],
        ["--explain", "BN999"],
    ],
)
def test_mistakes_get_one_line(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("batchnorm: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "steps is 0, --steps, "),
        (["--select", "XX"], "no rule 'XX', --select, "),
        (["--mask", "padding"], "a batch has no key 'padding', --mask 'padding', "),
        (["--state", "nothing (1).pt"], "no such file, --state nothing (1).pt, "),
        (["--fix", "--out", "doctor_nets.py"], "the file exists already, --out doctor_nets.py, "),
        (["--explain", "BN999"], "no rule 'BN999', --explain BN999, "),
    ],
)
def test_a_mistake_names_the_flag(capsys, arguments, named):
    _, _, err = run(capsys, "doctor_nets:with_batches", *arguments)
    assert named in err


def test_json(capsys):
    code, out, _ = run(capsys, "doctor_nets:untrained", "--json")
    result = json.loads(out)
    assert code == result["exit_code"] == 1
    finding = next(f for f in result["findings"] if f["code"] == "BN106")
    assert set(finding) >= {"code", "severity", "module", "message", "evidence", "fix"}
    assert result["not_examined"]["BN401"]


def test_sarif(capsys):
    code, out, _ = run(capsys, "doctor_nets:untrained", "--sarif")
    log = json.loads(out)
    assert (code, log["version"]) == (1, "2.1.0")
    (sarif,) = log["runs"]
    rules = sarif["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.code for rule in all_rules()]
    for result in sarif["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("note", "warning", "error")
        assert result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]


def test_fix_writes_a_state_that_is_mended(capsys, folder):
    code, out, _ = run(capsys, "doctor_nets:untrained", "--fix")
    assert code == 0
    assert out.rstrip().endswith("mended.pt")
    assert "BN106: 1 findings before, 0 after" in out
    state = torch.load(folder / "mended.pt", weights_only=True)
    assert state["1.running_mean"].any()
    again, _, _ = run(capsys, "doctor_nets:untrained", "--state", "mended.pt", "--json")
    assert again == 0
    run(capsys, "doctor_nets:untrained", "--fix")
    assert (folder / "mended-2.pt").exists()


def test_a_file(capsys, folder):
    from torch import nn

    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)).train()
    torch.export.save(torch.export.export(model, (torch.randn(4, 8),)), folder / "model.pt2")
    code, out, err = run(capsys, "model.pt2")
    assert (code, err) == (1, "")
    assert "BN401" in out


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "batchnorm doctor" in out
    assert "Example" in out
