"""The tables and pictures of docs/sgd.md from a finished study over batch sizes and optimizers.

    python benchmarks/sgd_page.py STUDY_DIR

Pictures are drawn as the study's report draws them. Needs Chromium and Pillow.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from readme_figure import BROWSERS, WIDTH, photograph, read_study

from batchnorm.experiment.report import factor_section, figures
from batchnorm.experiment.report.page import asset, json_for_script
from batchnorm.experiment.report.style import arm_color, arm_dash, arm_mark
from batchnorm.experiment.report.tables import Table

PAGE = Path(__file__).parents[1] / "docs" / "sgd.md"
IMAGES = PAGE.parent / "images"
TEMPLATE = """<!DOCTYPE html><html lang="en" class="printing"><meta charset="utf-8"><style>{{ css }}
.printing body { width: {{ width - 40 }}px; margin: 16px 20px; background: #fff; } html { background: #fff; }
figure { margin: 0 0 6px; } .printing .plot { height: var(--height); }
.printing .panels { grid-template-columns: repeat({{ columns }}, 1fr); }</style>
<body><div class="panels">{% for figure in figures %}<figure><figcaption>{{ figure.title }}</figcaption>
<div class="plot" data-figure="{{ figure.name }}" style="--height:{{ height }}px"></div></figure>{% endfor %}</div>
<script type="application/json" id="figures">{{ data }}</script><script>{{ plotly }}</script><script>{{ boot }}</script>
"""


def picture(drawn: Sequence[figures.Figure], path: Path, columns: int, height: int) -> None:
    """Draws figures side by side, `height` pixels each, and photographs them."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"sgd_page: no browser, none of {', '.join(BROWSERS)} is installed, install Chromium")
    html = Environment(autoescape=True).from_string(TEMPLATE).render(
        css=Markup(asset("report.css")), boot=Markup(asset("report.js")), plotly=Markup(get_plotlyjs()),
        data=json_for_script({figure.name: figure.to_json() for figure in drawn}), figures=drawn, columns=columns,
        width=WIDTH, height=height,
    )  # fmt: skip
    rows = -(-len(drawn) // columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph(browser, html, path, 32 + rows * (height + 34), 256)  # thin lines of five colors and their bands


def write_block(name: str, text: str) -> None:
    """Replaces what stands between the marks of this name in docs/sgd.md."""
    page = PAGE.read_text(encoding="utf-8")
    marks = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    found = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if not found.search(page):
        sys.exit(f"sgd_page: no mark {marks[0]}, {PAGE}, put it and {marks[1]} where the text belongs")
    PAGE.write_text(found.sub(lambda _: f"{marks[0]}\n{text}\n{marks[1]}", page), encoding="utf-8")


def cost_picture(
    ratios: Mapping[tuple[str, str, int], float], grown: Sequence[int], arms: Sequence[str], path: Path
) -> None:
    """Draws the cost of an update against the size of the data, both as multiples on logarithmic scales."""
    names = [f"{arm}, {words}" for arm in arms for words in ("all data", "mini-batch")]
    data = []
    for arm in arms:
        for batch, words in (("full", "all data"), ("mini", "mini-batch")):
            name = f"{arm}, {words}"
            data.append({
                "type": "scatter", "mode": "lines+markers", "x": list(grown), "name": name,
                "y": [ratios[arm, batch, f] for f in grown],
                "line": {"color": arm_color(names, name), "width": 2.4, "dash": arm_dash(names, name)},
                "marker": {"size": 9, "symbol": arm_mark(names, name)},
            })  # fmt: skip
    ticks = {"type": "log", "tickvals": list(grown), "ticktext": [f"{f} ×" for f in grown]}
    x, y = figures.axis("data", **ticks), figures.axis("cost of one update", **ticks)
    title = "What one update costs as the data grow (log scales)"
    picture([figures.Figure("cost", data, figures.layout(x, y, showlegend=True), 330, title, title)], path, 1, 330)


def markdown(table: Table) -> str:
    """A report's table as Markdown."""
    rule = "|" + "---|" * len(table.head)
    return "\n".join(["| " + " | ".join(table.head) + " |", rule, *("| " + " | ".join(r) + " |" for r in table.rows)])


def _only(table: Table, arms: Sequence[str]) -> Table:
    return Table(table.caption, table.head, [row for row in table.rows if row[0] in arms], table.lead)


def small_batches(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Arms down, batch sizes across: test accuracy."""
    levels = list(dict.fromkeys(entry["level"] for entry in entries))
    rows: dict[str, list[str]] = {}
    for entry in entries:
        half = entry.get("test_half_width")
        words = f"{100 * entry['test_accuracy']:.1f} ± {100 * half:.1f} %" if half is not None else "impossible"
        rows.setdefault(entry["arm"], []).append(words)
    return Table("", ["arm", *levels], [[f"`{arm}`", *cells] for arm, cells in rows.items()])


def against_own(claims: Mapping[str, Mapping[str, Any]]) -> Table:
    """Arms down, batch sizes across: points of test accuracy against the study's own batch size."""
    found = [c for c in claims.values() if c["factor"] == "batch_size" and c["measure"] == "accuracy"]
    found = [claim for claim in found if "against_level" in claim]
    levels = list(dict.fromkeys(claim["level"] for claim in found))
    rows: dict[str, dict[str, str]] = {}
    for claim in found:
        rows.setdefault(claim["arm"], {})[claim["level"]] = (
            f"{claim['estimate']:+.1f} ({claim['ci_low']:.1f} to {claim['ci_high']:.1f})".replace("-", "−")
        )
    lines = [[f"`{arm}`", *(own.get(level, "impossible") for level in levels)] for arm, own in rows.items()]
    return Table("", [f"points against {found[0]['against_level']}", *levels], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page's blocks and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished study with both factors")
    evidence = read_study(parser.parse_args(arguments).study)
    summary = evidence.summary
    parts = {part.factor: part for part in factor_section.parts(evidence)}
    if set(parts) != {"batch_size", "optimizer"}:
        sys.exit("sgd_page: not both factors, give a study made with several --batch-size and several --optimizer")
    pair = (summary["baseline"], summary["compared"])
    for factor, part in parts.items():
        name = factor.replace("_", "-")
        cells, claims = part.tables
        write_block(f"{name}-cells", f"{markdown(_only(cells, pair))}\n\n{cells.caption}")
        write_block(f"{name}-claims", f"{markdown(_only(claims, pair))}\n\n{claims.caption}")
        own = [figure for panels in part.panels if panels.arm in pair for figure in panels.figures]
        picture(own, IMAGES / f"sgd-{name}.png", 3, 280)
    entries = [entry for entry in summary["factors"]["cells"] if entry["factor"] == "batch_size"]
    sentences = " ".join(parts["batch_size"].impossible)
    write_block(
        "small-batches",
        f"{markdown(small_batches(entries))}\n\n{markdown(against_own(summary['factors']['claims']))}\n\n{sentences}",
    )
    picture(parts["batch_size"].overview, IMAGES / "sgd-small-batches.png", 1, 380)
    versions = f"torch {summary['torch']}, {summary['platform']}, commit {summary['commit']}"
    words = shlex.split(summary["command"])
    words[words.index("--out") + 1] = "sgd-study"
    command = shlex.join(words)
    minutes = f"{summary['runs']:,} runs; target {100 * summary['target_accuracy']:.1f} %; {versions}."
    write_block("study", f"```sh\n{command}\npython benchmarks/sgd_page.py sgd-study\n```\n\n{minutes}")
    print(PAGE)


if __name__ == "__main__":
    main()
