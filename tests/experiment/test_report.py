"""The report's page: complete, self-contained, inert to hostile names, and written whatever is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from batchnorm.experiment.output.files import write_whole
from batchnorm.experiment.report.page import write_report
from tests.experiment.fake_study import LAYERS, Study, fake_study

SECTIONS = ["verdicts", "accuracy", "rates", "regularization", "fans", "affine", "layers", "settings", "method"]
EIGHT = ("none", "batch_no_affine", "layer", "group", "instance", "ghost", "renorm", "batch")
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
VOID = {"meta", "line", "circle", "path", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The page as a browser would see it: its elements, its text, what its scripts hold; tags must nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            attributes = next(a for t, a in reversed(self.elements) if t == "script")
            self.scripts.append((attributes, data))
        elif inside == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> dict[str, dict]:
        return next(json.loads(body) for attributes, body in self.scripts if attributes.get("id") == "figures")

    def having(self, attribute: str) -> list[str | None]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def written(folder: Path, study: Study) -> Page:
    """The report of a study, without plotly's five megabytes, which take long to parse and are the same in each."""
    path = folder / "report.html"
    write_report(path, *study)
    return Page(path.read_text(encoding="utf-8").replace(get_plotlyjs(), "plotly"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(tmp_path_factory.mktemp("report"), fake_study())


def test_sections_cards_and_figures_are_all_there(page: Page) -> None:
    assert [value for value in page.having("id") if value in SECTIONS] == SECTIONS
    assert sum(tag == "h1" for tag, _ in page.elements) == 1
    assert "this network learns faster, tolerates more learning rates" in page.text
    assert "but depends more on dropout" in page.text
    for words in ("reaches 96.4 % in 5.2 times fewer steps, 95 % interval 4.1–6.6", "▲ Better", "▼ Worse"):
        assert words in page.text
    drawn = ["accuracy", "rates", "weight_decay", "dropout", "fan0", "fan1", "weight", "bias"]
    assert page.having("data-figure") == drawn
    assert list(page.figures) == drawn
    for fact in ("2.13.0+cpu", "0123456789abcdef0123456789abcdef01234567", "batchnorm study --out study", "1,797"):
        assert fact in page.text


def test_every_figure_is_described_and_every_link_stays_in_the_page(page: Page) -> None:
    described = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(described) == 8 + 6  # figures and the cards' interval plots
    assert all(len(a["aria-label"] or "") > 30 for a in described)
    ids = set(page.having("id"))
    assert all(link and link[0] == "#" and link[1:] in ids for link in page.having("href"))


def test_nothing_is_loaded_from_anywhere(page: Page) -> None:
    for attribute in ("src", "srcset", "action", "poster", "data", "xlink:href"):
        assert page.having(attribute) == []
    assert not any(tag in {"link", "iframe", "object", "embed", "base"} for tag, _ in page.elements)
    assert not re.search(r"url\(|@import|https?:", "".join(page.styles))


def test_policy_allows_exactly_the_two_scripts(page: Page) -> None:
    """Plotly's bundle knows addresses of map tiles: the policy, not its good will, keeps the page off the network."""
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    code = [body for attributes, body in page.scripts if attributes.get("type") != "application/json"]
    code = [get_plotlyjs() if body == "plotly" else body for body in code]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in code]
    assert len(code) == 2
    assert policy.startswith("default-src 'none'; script-src " + " ".join(hashes) + ";")
    assert not re.search(r"https?:|\*|unsafe-eval", policy)


def test_figures_are_valid_plotly(page: Page) -> None:
    for figure in page.figures.values():
        without_tokens = json.loads(re.sub(r'"--[a-z]+"', '"#123456"', json.dumps(figure)))
        go.Figure(without_tokens)


def test_curves_show_the_best_rate_alone(page: Page) -> None:
    summary, runs, traces = fake_study()
    rows = runs.query("arm == 'none' and purpose == 'measure' and weight_decay == 0 and dropout == 0")
    rows = rows[np.isclose(rows["lr"], summary["settings"]["none"]["best_lr"])]
    table = np.array([traces(run_id)["val_accuracy"] for run_id in rows["run_id"]])[:, 1:]
    band, line = page.figures["accuracy"]["data"][:2]
    np.testing.assert_allclose(line["y"], np.median(table, axis=0), rtol=1e-4)
    np.testing.assert_allclose(band["y"], [*table.max(axis=0), *table.min(axis=0)[::-1]], rtol=1e-4)


def test_heat_map_holds_means_and_marks_divergence(page: Page) -> None:
    _, runs, _ = fake_study()
    rows = runs.query("arm == 'none' and purpose == 'measure' and weight_decay == 0 and dropout == 0")
    heat = page.figures["rates"]["data"][0]
    np.testing.assert_allclose(heat["z"][1], rows.groupby("lr")["val_accuracy"].mean(), rtol=1e-4)
    lost = rows.groupby("lr")["diverged"].sum().tolist()
    for count, text in zip(lost, heat["text"][1], strict=True):
        assert ("✕" in text) == (count > 0)
        if 0 < count < 4:
            assert f"✕{count}" in text
    assert sum("★" in text for text in heat["text"][1]) == 1


def test_sweep_bars_are_student_intervals(page: Page) -> None:
    summary, runs, _ = fake_study()
    rows = runs.query("arm == 'batch' and purpose == 'measure' and weight_decay == 0 and dropout == 0.5")
    values = rows.loc[np.isclose(rows["lr"], summary["settings"]["batch"]["best_lr"]), "val_accuracy"].to_numpy()
    mean = page.figures["dropout"]["data"][3]
    assert len(values) == 4
    half = 3.182446 * values.std(ddof=1) / 2  # t quantile 0.975 with 3 degrees of freedom, over √4
    assert mean["y"][-1] == pytest.approx(values.mean(), rel=1e-4)
    assert mean["error_y"]["array"][-1] == pytest.approx(half, rel=1e-4)


def test_fans_share_axes_and_affine_boxes_are_percentiles(page: Page) -> None:
    first, second = (page.figures[name]["layout"] for name in ("fan0", "fan1"))
    assert first["yaxis"]["range"] == second["yaxis"]["range"]
    assert first["xaxis"]["range"] == second["xaxis"]["range"]
    summary, runs, traces = fake_study()
    rows = runs.query("arm == 'batch' and purpose == 'measure' and weight_decay == 0 and dropout == 0")
    ids = rows.loc[np.isclose(rows["lr"], summary["settings"]["batch"]["best_lr"]), "run_id"]
    pooled = [value for run_id in ids for value in traces(run_id)["affine"][1]["weight"]]
    box = page.figures["weight"]["data"][0]
    assert box["median"][1] == pytest.approx(np.median(pooled), rel=1e-4)
    assert box["lowerfence"][1] == pytest.approx(np.percentile(pooled, 5), rel=1e-4)


def hostile_study() -> Study:
    """Every text that a user or a file may have written is an attack."""
    summary, runs, traces = fake_study(("none", HOSTILE))
    summary["data"].update(name=HOSTILE, labels=[HOSTILE, "</script>", "]]>", "-->"])
    summary.update(model=HOSTILE, command=HOSTILE, platform=HOSTILE, commit=HOSTILE, batchnorm=HOSTILE)
    summary["claims"]["convergence"].update(text=HOSTILE, unit=HOSTILE)
    summary["claims"][HOSTILE] = {**summary["claims"]["drift"], "verdict": HOSTILE}
    for layers in summary["layers"].values():
        layers[0].update(name=HOSTILE, kind=HOSTILE)
    runs["optimizer"] = HOSTILE

    def hostile_traces(run_id: str) -> dict:
        trace = json.loads(json.dumps(traces(run_id)))
        trace["percentiles"].update(layer=HOSTILE, units=[HOSTILE] * 6)
        for layer in trace["affine"]:
            layer["layer"] += HOSTILE
        return trace

    return summary, runs, hostile_traces


def test_hostile_names_are_text(tmp_path: Path, page: Page) -> None:
    attacked = written(tmp_path, hostile_study())
    assert attacked.text.count("document.title='owned'") > 10  # it is shown …
    assert {tag for tag, _ in attacked.elements} <= {tag for tag, _ in page.elements}  # … and is nothing else
    assert sum(tag == "script" for tag, _ in attacked.elements) == 3
    assert attacked.having("onerror") == []
    raw = next(body for attributes, body in attacked.scripts if attributes.get("id") == "figures")
    assert not re.search("[<>&]", raw)


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def test_hostile_names_are_text_for_plotly_too(tmp_path: Path) -> None:
    """Plotly reads tags, %{…} and $…$ in every text of a figure."""
    study = hostile_study()
    study[0]["arms"][0] = study[0]["baseline"] = "%{x} $\\alpha$ <b>b</b>"
    study[0]["settings"]["%{x} $\\alpha$ <b>b</b>"] = study[0]["settings"]["none"]
    study[1]["arm"] = study[1]["arm"].replace("none", "%{x} $\\alpha$ <b>b</b>")
    attacked = written(tmp_path, study)
    texts = [text for figure in attacked.figures.values() for text in _texts(figure)]
    tags = {tag for text in texts for tag in re.findall(r"<[^>]*>", text)}
    assert tags <= {"<b>", "</b>", "<br>", "<extra>", "</extra>"}
    assert not any("$" in text or "%{x} " in text or "<b>b" in text for text in texts)


def _all_diverged() -> Study:
    summary, runs, traces = fake_study()
    runs = runs.assign(diverged=True, val_accuracy=0.1, test_accuracy=0.1, steps_to_target=np.nan, drift=np.nan)
    for claim in summary["claims"].values():
        claim.update(estimate=None, ci_low=None, ci_high=None, verdict="not measurable", reason="all diverged")
    summary["settings"] = {arm: dict.fromkeys(("best_lr", "lr", "weight_decay", "dropout")) for arm in summary["arms"]}
    summary["target_accuracy"] = None
    return summary, runs, traces


def _no_traces() -> Study:
    summary, runs, _ = fake_study()

    def gone(run_id: str) -> dict:
        raise FileNotFoundError(run_id)

    return summary, runs, gone


def _censored() -> Study:
    summary, runs, traces = fake_study()
    claim = {"estimate": 3.0, "null": 1, "ci_low": 2.0, "ci_high": None, "unit": "times", "verdict": "better", "n": 4}
    summary["claims"]["convergence"] = {**claim, "censored": 4, "text": "reaches it in at least 3 times fewer steps"}
    summary["claims"]["drift"].update(ci_low=0.0, ci_high=None)
    runs.loc[runs["arm"] == "none", "steps_to_target"] = np.nan
    return summary, runs, traces


def _bare() -> Study:
    return {}, pd.DataFrame(), lambda run_id: {}


def _broken_numbers() -> Study:
    summary, runs, traces = fake_study()
    summary["claims"]["drift"].update(estimate=math.nan, ci_low=-math.inf, ci_high=math.inf)

    def with_nulls(run_id: str) -> dict:
        trace = traces(run_id)
        holes = [[[None] * 3] * 6, *trace["percentiles"]["values"][1:]]
        affine = [{"layer": "a", "weight": [None, math.nan, 1.0], "bias": None}]
        return {**trace, "percentiles": {**trace["percentiles"], "values": holes}, "affine": affine}

    return summary, runs, with_nulls


def _odd_percentiles() -> Study:
    summary, runs, traces = fake_study()
    return summary, runs, lambda run_id: {**traces(run_id), "percentiles": {"values": [[[1, 2]]]}, "affine": None}


MISSING = {
    "one arm": (lambda: fake_study(("batch",)), "nothing to compare"),
    "eight arms": (lambda: fake_study(EIGHT, seeds=2), "batch renormalization"),
    "one seed": (lambda: fake_study(seeds=1), "Verdicts"),
    "all diverged": (_all_diverged, "Not measurable"),
    "no traces": (_no_traces, "traces are missing"),
    "no layers with γ": (lambda: fake_study(("none", "batch_no_affine")), "No arm of this study learned γ or β"),
    "censored": (_censored, "4 censored"),
    "nothing at all": (_bare, "The study made no claims"),
    "no numbers": (_broken_numbers, "Not measurable"),
    "percentiles of another shape": (_odd_percentiles, "No percentiles were recorded"),
}


@pytest.mark.parametrize("name", MISSING)
def test_whatever_is_missing_a_whole_report_is_written(name: str, tmp_path: Path) -> None:
    study, words = MISSING[name]
    page = written(tmp_path, study())
    assert [value for value in page.having("id") if value in SECTIONS] == SECTIONS
    assert words in page.text
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    assert set(page.having("data-figure")) == set(page.figures)


def test_open_end_of_an_interval_is_an_arrow(tmp_path: Path) -> None:
    page = written(tmp_path, _censored())
    labels = [label for label in page.having("aria-label") if label and label.startswith("Estimate")]
    assert "Estimate 3, 95 % interval 2 to open, no effect at 1" in labels
    assert sum(tag == "path" for tag, _ in page.elements) == 3


def test_layers_with_few_values_are_named(tmp_path: Path) -> None:
    summary, runs, traces = fake_study()
    summary["layers"]["batch"][0]["m"] = 8
    page = written(tmp_path, (summary, runs, traces))
    assert page.text.count("8 (few)") == 1
    assert all(name in page.text for name in LAYERS)


def test_old_report_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    write_report(path, *fake_study())
    assert path.stat().st_mode & 0o044  # can be shared: not for its owner alone
