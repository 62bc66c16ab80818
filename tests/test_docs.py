"""The pages of docs/variants: every snippet runs, every test they name exists, every pair has a cell."""

import ast
import re
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "variants").glob("*.md"))
WITH_TESTS = [*PAGES, ROOT / "docs" / "works-with.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks or page.stem in ("README", "benchmarks")
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("page", WITH_TESTS, ids=lambda page: page.stem)
def test_what_is_named_exists(page):
    text = page.read_text()
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        functions = [n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)]
        assert name in functions, f"{page.name}: {path}::{name}"
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_tool_has_a_test():
    text = (ROOT / "docs" / "works-with.md").read_text().partition("## Versions")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| with |")]
    assert len(rows) > 30
    assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row)]


def test_every_pair_has_a_cell_and_every_letter_a_test():
    text = (ROOT / "docs" / "variants" / "README.md").read_text()
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    letters = {row[0] for row in rows if re.fullmatch("[a-z]", row[0])}
    columns = next(row for row in rows if row[0] == "" and "masked" in row)
    names = ["synchronized", *columns[1:]]
    cells = {
        (row[0], column): cell for row in rows if row[0] in names for column, cell in zip(columns, row, strict=True)
    }
    for a, b in combinations(names, 2):
        cited = set(re.findall(r"\b[a-z]\b", cells[a, b]))
        assert cited, (a, b)
        assert cited <= letters, (a, b)
