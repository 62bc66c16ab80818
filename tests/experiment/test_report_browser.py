"""The report in a real browser: it draws, stays silent under attack, and fits a phone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.experiment.report.page import write_report
from tests.experiment.fake_study import fake_study
from tests.experiment.test_report import hostile_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the report in")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
    *("--virtual-time-budget=5000", "--dump-dom"),
)
# What a test adds to a copy of the page to read what only a script can see.
PROBE = """<script>window.addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement;
  root.setAttribute("data-overflow", root.scrollWidth - root.clientWidth);
  const fits = (box) => box.querySelector(".main-svg")?.clientWidth === box.clientWidth;
  const boxes = Array.from(document.querySelectorAll("[data-figure]"));
  root.setAttribute("data-misfits", boxes.filter((box) => !fits(box)).length);
}, 500));</script>"""


def opened(path: Path, width: int = 1280) -> tuple[str, str]:
    """The document after its scripts have run, and what the browser logged from the page's console."""
    assert CHROMIUM
    home = path.parent / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={home}", f"--window-size={width},900", path.as_uri()]
    environment = {**os.environ, "HOME": str(path.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_hostile_report_draws_every_figure_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, *hostile_study())
    document, console = opened(path)
    assert console == ""
    assert "<title>owned" not in document
    boxes = re.findall(r'data-figure="(\w+)"', document)
    assert len(re.findall(r'class="plot js-plotly-plot"', document)) == len(boxes) == 8
    body = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    tags = set(re.findall(r"<(\w+)", re.sub(r'="[^"]*"', "", body)))
    assert "rect" in tags
    assert "img" not in tags


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_page_never_scrolls_sideways(tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    arms = ("none", "batch_no_affine", "layer", "a_normalization_with_a_rather_long_name", "batch")
    write_report(path, *fake_study(arms, seeds=2))
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"<meta http-equiv[^>]*>", PROBE, text, count=1), encoding="utf-8")
    document, _ = opened(path, width)
    assert 'data-overflow="0"' in document
    assert 'data-misfits="0"' in document


@pytest.mark.slow
def test_readme_figure_is_drawn_from_the_files_of_a_study(tmp_path: Path) -> None:
    summary, runs, traces = fake_study(seeds=2)
    (tmp_path / "traces").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    runs.to_csv(tmp_path / "runs.csv", index=False)
    for run_id in runs["run_id"]:
        (tmp_path / "traces" / f"{run_id}.json").write_text(json.dumps(traces(run_id)), encoding="utf-8")
    script = Path(__file__).parents[2] / "benchmarks" / "readme_figure.py"
    picture = tmp_path / "images" / "study.png"
    subprocess.run([sys.executable, script, tmp_path, picture], check=True, timeout=150)
    assert 20_000 < picture.stat().st_size < 200_000  # a blank picture is smaller than that
