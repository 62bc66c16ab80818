"""The command: exit codes, formats, and one line for each mistake."""

import importlib
import json
import subprocess
import sys
from xml.etree import ElementTree

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
def number_two(): return net(momentum=0.9)
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


SPOILED = """
import torch
from torch import nn
from tests.doctor.nets import NETS, batches_for, train

CNN = NETS["cnn"]

def good():
    torch.manual_seed(1)
    return train(CNN.make(), batches_for(CNN, 36, 32, seed=1), 120).eval()

def data(count=36):
    return batches_for(CNN, count, 32, seed=2)

def spoil(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean += 20 * torch.randn(m.num_features, generator=torch.Generator().manual_seed(3))
    return model

def frozen():
    model = spoil(good()).train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)
    return model, data()

def keras():
    model = good()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.99
    return model, data()

def few():
    return spoil(good()).train(), data(4)

def tiny():
    (x, y), = data(1)
    return good(), [(x[:10], y[:10])]

def fine():
    return good(), data()

def trains():
    return good().train(), data()
"""


@pytest.fixture
def spoiled(folder):
    (folder / "bad.py").write_text(SPOILED)
    yield folder
    sys.modules.pop("bad", None)


def accuracy(model, batches):
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


@pytest.mark.parametrize(("name", "expected"), [("fine", 0), ("few", 1), ("frozen", 1), ("tiny", 3)])
def test_no_false_all_clear(capsys, spoiled, name, expected):
    code, out, err = run(capsys, f"bad:{name}")
    assert (code, err) == (expected, "")
    assert out.startswith("symptom: accuracy by statistics: batch ")
    assert ("could not look: BN202" in out) == (expected == 3)


def test_fix_recalibrates_what_it_freezes(capsys, spoiled):
    code, out, _ = run(capsys, "bad:frozen", "--fix")
    import bad

    model, batches = bad.frozen()
    before = accuracy(model.eval(), batches)
    model.load_state_dict(torch.load(spoiled / "mended.pt", weights_only=True))
    assert accuracy(model.eval(), batches) > before + 0.3
    assert code == 1  # the layers are frozen in the code only
    assert "verified: the answers are better" in out
    patch = out[out.index("--- a/bad.py") : out.index("changed tensors")]
    (spoiled / "the.patch").write_text(patch)
    subprocess.run(["patch", "-p1", "-i", "the.patch"], cwd=spoiled, check=True, capture_output=True)
    sys.modules.pop("bad")
    importlib.invalidate_caches()
    code, out, _ = run(capsys, "bad:frozen", "--state", "mended.pt")
    assert code == 0, out


def test_only_what_changed_is_written(capsys, spoiled):
    code, out, _ = run(capsys, "bad:keras", "--fix")
    assert code == 1
    assert "momentum = 0.01" in out
    assert "unsafe" in out
    assert not list(spoiled.glob("mended*"))
    assert run(capsys, "bad:fine", "--fix")[0] == 0
    assert not list(spoiled.glob("mended*"))


def test_diff_writes_nothing(capsys, spoiled):
    code, out, _ = run(capsys, "bad:frozen", "--diff")
    assert code == 1
    assert "changed tensors: 1.running_mean" in out
    assert not list(spoiled.glob("mended*"))


def test_a_repair_that_was_not_measured_is_no_all_clear(capsys):
    assert run(capsys, "doctor_nets:biased", "--fix")[0] == 1
    code, out, _ = run(capsys, "doctor_nets:number_two", "--fix")
    assert (code, "not measured" in out) == (1, True)


def test_a_target_of_any_form(capsys, spoiled):
    (spoiled / "sub").mkdir()
    (spoiled / "sub" / "net.py").write_text(
        "from bad import *\nmodel = good()\nclass Net(nn.BatchNorm1d):\n"
        "    def __init__(self): super().__init__(4)\n"
        "def whole():\n    m = good().train(); o = torch.optim.AdamW(m.parameters(), weight_decay=0.1)\n"
        "    return {'model': m, 'batches': data(), 'optimizer': o, 'steps': 1000}\n"
        "def wrong():\n    return {'model': good(), 'bathces': data()}\n"
    )
    for target in ("sub/net.py:model", "sub/net.py:Net"):
        assert run(capsys, target)[0] == 0
    code, out, _ = run(capsys, "sub/net.py:whole", "--output-format", "json")
    result = json.loads(out)
    assert code == 0
    assert {"BN104", "BN303"} <= set(result["examined"])
    assert "bathces" in run(capsys, "sub/net.py:wrong")[2]
    assert "no such file" in run(capsys, "sub/none.py:f")[2]


def test_optimizer_step_and_mask_by_name(capsys, spoiled):
    (spoiled / "loop.py").write_text(
        "import torch\nfrom torch.nn import functional as F\n"
        "def adam(model): return torch.optim.Adam(model.parameters(), weight_decay=0.1)\n"
        "def step(model, optimizer, batch):\n"
        "    for x, y in zip(batch[0].chunk(2), batch[1].chunk(2)): F.cross_entropy(model(x), y).backward()\n"
        "    optimizer.step(); optimizer.zero_grad()\n"
        "def mask(batch): return torch.ones(len(batch[0]), 8, 8, dtype=torch.bool)\n"
        "def right(output, target): return (output.argmax(1) == target).double()\n"
    )
    arguments = ["--optimizer", "loop:adam", "--step", "loop:step", "--mask", "loop:mask", "--metric", "loop:right"]
    code, out, err = run(capsys, "bad:trains", *arguments, "--json")
    assert err == ""
    result = json.loads(out)
    assert {"BN104", "BN302"} <= {f["code"] for f in result["findings"]}
    assert "BN205" in result["examined"]
    assert result["symptom"]["scale"] == "metric"
    assert "BN104" in run(capsys, "bad:fine", "--optimizer", "AdamW")[1]
    for wrong in (["--step", "loop:step"], ["--optimizer", "Nothing"], ["--metric", "accuracy"], ["--step", "loop:no"]):
        code, out, err = run(capsys, "bad:fine", *wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert wrong[0] in err


FORMATS = ["concise", "full", "json", "sarif", "github", "junit"]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(capsys, spoiled, form):
    code, out, err = run(capsys, "bad:few", "--output-format", form)
    assert (code, err) == (1, "")
    assert "BN202" in out
    if form == "junit":
        suite = ElementTree.fromstring(out)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) > 0
    if form == "github":
        assert "::error file=bad.py,line=" in out
    if form in ("concise", "full"):
        fix = "batchnorm.recalibrate(model, batches)"
        assert any(fix in line for line in out.splitlines())
        assert out.splitlines()[-1].startswith("not examined: ")


def test_sarif_points_into_the_source(capsys, spoiled):
    (spoiled / "own.py").write_text(
        "from torch import nn\n\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.lin = nn.Linear(4, 8)\n        self.bn = nn.BatchNorm1d(8, momentum=0.9)\n"
        "    def forward(self, x):\n        return self.bn(self.lin(x))\n"
    )
    _, out, _ = run(capsys, "own:Own", "--output-format", "sarif")
    results = {r["ruleId"]: r for r in json.loads(out)["runs"][0]["results"]}
    place = results["BN102"]["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "own.py"
    assert place["region"]["startLine"] == 7
    fingerprints = [r["partialFingerprints"]["ruleAndLayer/v1"] for r in results.values()]
    assert len(set(fingerprints)) == len(fingerprints)


def test_rules_are_listed(capsys):
    assert main(["rules"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(all_rules())
    assert main(["rules", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["code"] for row in rows] == [rule.code for rule in all_rules()]
    assert {row["repair"] for row in rows} == {"none", "safe", "unsafe"}


def test_rules_by_name(capsys):
    assert run(capsys, "doctor_nets:biased", "--ignore", "redundant-bias")[0] == 0
    assert run(capsys, "doctor_nets:biased", "--select", "redundant-bias")[0] == 1
    assert run(capsys, "--explain", "redundant-bias")[1].startswith("# BN101")


def test_settings_of_the_project(capsys, folder):
    project = folder / "pyproject.toml"
    project.write_text('[tool.batchnorm]\nignore = ["BN101"]\n')
    assert run(capsys, "doctor_nets:biased")[0] == 0
    project.write_text('[tool.batchnorm.per-layer-ignores]\n"0" = ["redundant-bias"]\n')
    assert run(capsys, "doctor_nets:biased")[0] == 0
    project.write_text('[tool.batchnorm.per-layer-ignores]\n"1" = ["redundant-bias"]\n')
    assert run(capsys, "doctor_nets:biased")[0] == 1
    for wrong in (
        "[tool.batchnorm]\nignroe = []",
        "[tool.batchnorm]\nignore = 3",
        "[tool",
        "[tool.batchnorm]\nignore=['X9']",
    ):
        project.write_text(wrong)
        code, out, err = run(capsys, "doctor_nets:biased")
        assert (code, out, err.count("\n")) == (2, "", 1)
