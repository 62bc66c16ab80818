"""The page: one HTML file that holds all that it shows.

Jinja2 fills the template, since it escapes by default what a template merely prints: a label holding HTML is text.
A content security policy allows the page's own two scripts by their hash and nothing else, no network of any kind.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ..output.files import write_whole
from . import cards, factor_section, figures, inside_network, tables
from .evidence import StudyEvidence, Trace
from .style import arm_words


def write_report(
    path: str | os.PathLike[str],
    summary: Mapping[str, Any],
    runs: pd.DataFrame,
    traces: Callable[[str], Trace],
) -> None:
    """Write the study's report to `path`: one HTML file that opens offline.

    `summary` is what `summary.json` holds, `runs` has the columns of `runs.csv`, and `traces(run_id)` gives what
    `traces/RUN_ID.json` holds; a trace that raises OSError, KeyError or ValueError is left out. The file appears
    under its name only when it is complete.
    """
    html = render(StudyEvidence(summary, runs, traces))
    write_whole(Path(path), html)


def render(evidence: StudyEvidence) -> str:
    """Return the page as text."""
    plotly, boot = get_plotlyjs(), asset("report.js")
    drawn = _figures(evidence)
    parts = factor_section.parts(evidence)
    shown = [figure for group in (*drawn.values(), *(part.figures for part in parts)) for figure in group]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(asset("report.html")).render(
        title=f"batchnorm study: {evidence.summary.get('model', '')} on {_data_name(evidence)}",
        policy=_policy(plotly, boot),
        css=Markup(asset("report.css")),
        plotly=Markup(plotly),
        boot=Markup(boot),
        figures_json=json_for_script({figure.name: figure.to_json() for figure in shown}),
        headline=cards.headline(evidence),
        remainder=cards.remainder(evidence),
        cards=cards.cards(evidence.summary),
        drawn=drawn,
        factors=parts,
        tables=_tables(evidence),
        few=tables.FEW_VALUES,
        bare=[arm for arm in evidence.arms if not (evidence.summary.get("layers") or {}).get(arm)],
        zone=inside_network.zone_of(evidence.summary),
        provenance=tables.provenance(evidence),
        diverged=evidence.diverged(),
        **_words(evidence),
    )


def _figures(evidence: StudyEvidence) -> dict[str, list[figures.Figure]]:
    found: dict[str, Sequence[figures.Figure | None]] = {
        "accuracy": [figures.accuracy(evidence)],
        "rates": [figures.rates(evidence)],
        "sweeps": [
            figures.sweep(evidence, "weight_decay", "weight decay"),
            figures.sweep(evidence, "dropout", "dropout"),
        ],
        "fans": inside_network.fans(evidence),
        "affine": inside_network.affine(evidence),
    }
    return {name: [figure for figure in group if figure] for name, group in found.items()}


def _tables(evidence: StudyEvidence) -> dict[str, list[tables.Table]]:
    found: dict[str, Sequence[tables.Table | None]] = {
        "accuracy": [tables.accuracy(evidence)],
        "rates": [tables.grid(evidence, "lr", "Learning rate")],
        "sweeps": [
            tables.grid(evidence, "weight_decay", "Weight decay"),
            tables.grid(evidence, "dropout", "Dropout"),
        ],
        "fans": [tables.fans(evidence)],
        "affine": [tables.affine(evidence)],
        "layers": tables.layers(evidence),
        "comparisons": tables.comparisons(evidence),
        "settings": [tables.settings(evidence)],
    }
    return {name: [table for table in group if table] for name, group in found.items()}


def _words(evidence: StudyEvidence) -> dict[str, Any]:
    """Return the words of the summary that the template shows."""
    summary = evidence.summary
    seeds = {"choose": [], "measure": [], **(summary.get("seeds") or {})}
    return {
        "model": str(summary.get("model", "a network")),
        "data": _data_name(evidence),
        "made": str(summary.get("created") or "")[:10],
        "baseline": str(summary.get("baseline", "")),
        "compared": str(summary.get("compared", "")),
        "arms": [(arm, arm_words(arm)) for arm in evidence.arms],
        "runs": len(evidence.runs),
        "seeds": {name: len(values) for name, values in seeds.items()},
        "claims": len(summary.get("claims") or {}),
        "target": evidence.target,
        "networks": {str(arm): str(tree) for arm, tree in (summary.get("networks") or {}).items()},
        "metric": evidence.metric.name,
        "recorded": summary.get("kind") == "analysis",
    }


def _data_name(evidence: StudyEvidence) -> str:
    return str((evidence.summary.get("data") or {}).get("name", "data"))


def asset(name: str) -> str:
    """Return a file of this package: the template, the style or the script."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def json_for_script(value: Any) -> Markup:
    """Return JSON for a <script>: no text in it can end the script or open a comment; NaN and Inf become null."""
    return htmlsafe_json_dumps(_known(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_known(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if value - value == 0 else None
    return value


def _policy(*scripts: str) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    # Plotly sets inline styles, and saves a figure as an image by way of data: and blob: addresses.
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
