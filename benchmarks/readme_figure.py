"""The README's picture: accuracy and percentile fans of a finished study, drawn as its report draws them.

    python benchmarks/readme_figure.py STUDY_DIR docs/images/study.png

Needs Chromium, which takes the picture, and Pillow, which brings it to a palette (under 200 KB).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs

from batchnorm.experiment.report import figures, inside_network
from batchnorm.experiment.report.evidence import StudyEvidence, Trace
from batchnorm.experiment.report.page import asset, json_for_script

WIDTH, HEIGHT, SCALE, COLORS = 900, 720, 2, 96
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGE = """<!DOCTYPE html><html lang="en" class="printing"><meta charset="utf-8"><style>{{ css }}
.printing body { width: {{ width - 40 }}px; margin: 16px 20px; background: #fff; } html { background: #fff; }
figure { margin: 0 0 6px; } .printing .plot { height: var(--height); }</style>
<body>
<figure><figcaption>Validation accuracy: median seed, band over all {{ seeds }} seeds ({{ what }})</figcaption>
<div class="plot" data-figure="{{ accuracy.name }}" style="--height:330px"></div></figure>
<div class="panels">{% for fan in fans %}<figure><figcaption>Input of a hidden unit: {{ fan.title }}</figcaption>
<div class="plot" data-figure="{{ fan.name }}" style="--height:270px"></div></figure>{% endfor %}</div>
<script type="application/json" id="figures">{{ data }}</script><script>{{ plotly }}</script><script>{{ boot }}</script>
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args(arguments)
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(
            f"readme_figure: no browser, none of {', '.join(BROWSERS)} is installed, install Chromium", file=sys.stderr
        )
        return 2
    if not (options.study / "summary.json").exists():
        print(f"readme_figure: no finished study, {options.study}, run `make study` first", file=sys.stderr)
        return 2
    html = page(read_study(options.study))
    if html is None:
        print(
            f"readme_figure: no curves or fans, {options.study}, every run diverged or lost its trace", file=sys.stderr
        )
        return 2
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    photograph(browser, html, options.picture)
    return 0


def read_study(folder: Path) -> StudyEvidence:
    def trace(run_id: str) -> Trace:
        return json.loads((folder / "traces" / f"{run_id}.json").read_text(encoding="utf-8"))

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return StudyEvidence(summary, pd.read_csv(folder / "runs.csv"), trace)


def page(evidence: StudyEvidence) -> str | None:
    """The picture as a page; None where the study has nothing to draw."""
    accuracy, fans = figures.accuracy(evidence), inside_network.fans(evidence)
    if accuracy is None or not fans:
        return None
    fans = [fans[0], fans[-1]] if len(fans) > 1 else fans
    summary = evidence.summary
    return Environment(autoescape=True).from_string(PAGE).render(
        css=Markup(asset("report.css")), boot=Markup(asset("report.js")), plotly=Markup(get_plotlyjs()),
        data=json_for_script({figure.name: figure.to_json() for figure in (accuracy, *fans)}),
        accuracy=accuracy, fans=fans, width=WIDTH, seeds=len(summary["seeds"]["measure"]),
        what=f"{summary['model']} on {summary['data']['name']}",
    )  # fmt: skip


def photograph(browser: str, html: str, picture: Path, height: int = HEIGHT, colors: int = COLORS) -> None:
    """Takes the page's picture without a network, at twice the size for sharp screens, in a small palette."""
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        source.write_text(html, encoding="utf-8")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
            f"--window-size={WIDTH},{height}", f"--force-device-scale-factor={SCALE}", "--virtual-time-budget=5000",
            f"--screenshot={shot}", source.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
