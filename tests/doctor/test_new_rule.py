"""A new rule is one file and one page: nothing else names its code, its place in the order, its needs or its repair."""

import re
import sys
from pathlib import Path

import pytest
from torch import nn

import batchnorm
from batchnorm import diagnose
from batchnorm.doctor import rules
from batchnorm.doctor.pages import page
from batchnorm.doctor.repair import repair
from batchnorm.doctor.report.sarif import to_sarif
from batchnorm.doctor.testing import check_rule
from batchnorm.errors import UserError

RULE = """
from ..change import Change
from ..rule import Found, rule


def set_eps(context, finding):
    context.module(finding.module).eps = 1e-5
    return [Change(finding.code, finding.module, "eps", str(finding.evidence["eps"]), "1e-05")]


@rule(
    "BN999",
    "huge-eps",
    summary="ε is larger than any variance.",
    order=5,
    needs=("model", "steps"),
    fix="set eps=1e-5",
    false_alarm="the variances are larger still",
    repair=set_eps,
)
def huge_eps(evidence):
    for layer in evidence.layers:
        if layer.eps > 1:
            yield Found(layer.name, "its ε decides its scale", {"eps": layer.eps}, severity="error")
"""


@pytest.fixture(autouse=True)
def made_up_rule(tmp_path, monkeypatch):
    """One file in a folder of rules, and one page in the folder beside it."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "pages").mkdir()
    (tmp_path / "rules" / "bn999_huge_eps.py").write_text(RULE)
    (tmp_path / "pages" / "BN999.md").write_text("# BN999 huge-eps\n")
    monkeypatch.setattr("batchnorm.doctor.rule._RULES", {rule.code: rule for rule in rules.all_rules()})
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path / "rules")])
    rules.all_rules.cache_clear()
    yield
    sys.modules.pop("batchnorm.doctor.rules.bn999_huge_eps", None)
    rules.all_rules.cache_clear()


def net():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, eps=10.0, momentum=0.0))


def test_it_is_examined_and_comes_in_its_place():
    diagnosis = diagnose(net(), steps=10_000)
    assert [finding.code for finding in diagnosis.findings] == ["BN999", "BN102", "BN101"]
    assert diagnosis.findings[0].fix == "set eps=1e-5"
    assert "BN999" in to_sarif(diagnosis)["runs"][0]["results"][0]["ruleId"]
    assert diagnose(net(), steps=10_000, select="BN9").examined == ("BN999",)
    assert "planned" in diagnose(net()).not_examined["BN999"]


def test_it_is_explained():
    assert page("bn999") == "# BN999 huge-eps\n"


def test_it_is_repaired():
    model = net()
    report = repair(model, steps=10_000)
    assert model[1].eps == 1e-5
    assert [(c.module, c.before, c.after) for c in report.changes if c.code == "BN999"] == [("1", "10.0", "1e-05")]
    assert (report.before["BN999"], report.after["BN999"]) == (1, 0)


def test_only_rules_name_codes():
    doctor = Path(batchnorm.__file__).parent / "doctor"
    others = [path for path in doctor.rglob("*.py") if path.parent.name != "rules"]
    assert [str(path) for path in others if re.search(r"BN\d", path.read_text())] == []


def test_an_entry_point_brings_rules(monkeypatch):
    class Entry:
        name, value = "others", "others.rules"

        def load(self):
            raise ImportError("no module named others")

    asked = []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: asked.append(group) or [Entry()])
    rules.all_rules.cache_clear()
    with pytest.raises(UserError, match=r"the rules of others\.rules cannot be loaded"):
        diagnose(net())
    assert asked == ["batchnorm.rules"]
    Entry.load = lambda self: sys.modules["others"]
    monkeypatch.setitem(sys.modules, "others", object())
    assert "BN999" in {rule.code for rule in rules.all_rules()}


def test_the_test_kit():
    def healthy():
        return {"model": nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)), "steps": 10_000}

    def faulty():
        return {"model": net(), "steps": 10_000}

    check_rule("BN999", faulty=faulty, healthy=healthy)
    with pytest.raises(AssertionError, match="does not find"):
        check_rule("BN999", faulty=healthy, healthy=healthy)
    with pytest.raises(AssertionError, match="blames"):
        check_rule("BN999", faulty=faulty, healthy=faulty)
