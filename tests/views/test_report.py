"""A report is one self-contained file that escapes model output, with plots for light and dark pages."""

from __future__ import annotations

import html
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from finesteer_hf.evaluation.measures.statistics import proportion
from finesteer_hf.method_api import DosePoint
from finesteer_hf.views.plots import plot_dose_response
from finesteer_hf.views.report import (
    Answer,
    Exchange,
    Headline,
    Plot,
    Report,
    Section,
    Table,
    render_report,
    write_report,
)


POINTS = [DosePoint(s, s - 0.2 * s * s, 0.1, 0.01 * s) for s in np.linspace(0, 4, 5)]


@pytest.fixture
def report() -> Report:
    section = Section(
        "Truth",
        ["Held-out questions."],
        [Table(["figure", "steered"], [["truthful", str(proportion(9, 10))]], "Shares", "Wilson intervals.")],
        [Plot(partial(plot_dose_response, POINTS), "How the dose was chosen.")],
        [Exchange("<b>Is it?</b>", [Answer("unsteered", "<script>alert(1)</script>", "bad"), Answer("steered", "")])],
    )
    return Report("Demo", "What was done.", [Headline("truthful", "90%", "n=10")], [section], {"seed": "0"})


def test_a_report_is_self_contained(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "url(" not in text and "@import" not in text and "<script" not in text
    for expected in (
        "Demo",
        "90.0% [",
        "n=10",
        "Wilson intervals.",
        "How the dose was chosen.",
        "(nothing)",
        "seed: 0",
    ):
        assert expected in text
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_plot_has_a_picture_for_each_page_and_says_what_it_shows(report: Report) -> None:
    text = render_report(report)
    dark, light = re.findall(r'base64,([^"]*)"', text)
    assert dark != light and 'media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,' + dark in text
    assert [html.unescape(alt) for alt in re.findall(r'<img alt="([^"]*)"', text)] == [plot_dose_response(POINTS).alt]


def test_model_output_is_escaped_and_tags_are_closed(report: Report, tmp_path: Path) -> None:
    text = write_report(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<b>Is it?</b>" not in text

    class Balance(HTMLParser):
        open_tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "source"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.open_tags == []
