"""Each rule has a page with examples that run: the first has the fault, and the next one has it no longer."""

import re

import pytest

from batchnorm.doctor.pages import page
from batchnorm.doctor.rules import all_rules
from batchnorm.errors import UserError

CODES = [
    *("BN101", "BN102", "BN103", "BN104", "BN105", "BN106", "BN107", "BN108", "BN109", "BN110", "BN111", "BN112"),
    *("BN201", "BN202", "BN203", "BN204", "BN205", "BN206", "BN207", "BN208"),
    *("BN301", "BN302", "BN303", "BN304", "BN305", "BN401", "BN402"),
]
# The example of BN304 is a script that starts two processes. tests/doctor/test_ranks.py runs it.
IN_PROCESS = [code for code in CODES if code != "BN304"]


def examples(code: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page(code), re.S)


def test_every_code_of_the_table_has_a_rule():
    assert [rule.code for rule in all_rules()] == CODES


@pytest.mark.parametrize("code", CODES)
def test_the_sections(code):
    text = page(code)
    assert text.startswith(f"# {code} ")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == ["Symptom", "Cause", "Example", "Fix", "False alarm", "References"]


@pytest.mark.parametrize("code", IN_PROCESS)
def test_the_examples(code):
    blocks = examples(code)
    scope: dict = {}
    exec(compile(blocks[0], f"{code}.md", "exec"), scope)
    assert code in scope["diagnosis"].codes
    for block in blocks[1:]:
        exec(compile(block, f"{code}.md", "exec"), scope)
        assert code not in scope["diagnosis"].codes


def test_an_unknown_code():
    with pytest.raises(UserError, match="BN999"):
        page("BN999")
