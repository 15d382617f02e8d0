"""Plots render, and a report is one self-contained file that escapes model output."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from finesteer_hf.evaluation.measures.statistics import proportion
from finesteer_hf.evaluation.plots import (
    plot_dose_response,
    plot_expert_use,
    plot_gate_roc,
    plot_gate_scores,
    plot_shares,
    png,
)
from finesteer_hf.evaluation.report import Answer, Exchange, Headline, Plot, Report, Section, Table, write_report
from finesteer_hf.method_api import DosePoint


POINTS = [DosePoint(s, s - 0.2 * s * s, 0.1, 0.01 * s) for s in np.linspace(0, 4, 5)]


def test_every_plot_is_a_png() -> None:
    generator = np.random.default_rng(0)
    ir, general = generator.normal(1, 1, 30), generator.normal(0, 1, 40)
    for figure in (
        plot_gate_scores(ir, general, threshold=0.5),
        plot_gate_scores([1.0, 1.0], []),
        plot_gate_roc({"state": (ir, general), "ser": (general, ir)}),
        plot_dose_response(POINTS, chosen=2.0),
        plot_expert_use(generator.dirichlet(np.ones(3), 20), [f"kind {i % 4}" for i in range(20)]),
        plot_shares({"truthful": {"unsteered": proportion(0, 9), "steered": proportion(9, 9)}, "none": {}}),
    ):
        assert png(figure, dpi=40).startswith(b"\x89PNG")
    assert png(plot_dose_response(POINTS), dpi=40) == png(plot_dose_response(POINTS), dpi=40)


def test_a_dose_curve_keeps_its_numbers() -> None:
    top, bottom = plot_dose_response(POINTS).axes
    np.testing.assert_allclose(top.lines[0].get_ydata(), [p.bottleneck for p in POINTS])
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), [p.kl for p in POINTS])
    assert bottom.get_ylim() == (0, pytest.approx(1.1 * 0.04))


def test_rounding_is_invisible_and_one_point_is_not_a_curve() -> None:
    points = [DosePoint(s, 0.1, 0.01, 1e-8, own_words=-0.1 if s == 0 else None) for s in (0.0, 1.0, 2.0)]
    axes = plot_dose_response(points).axes
    assert len(axes) == 2 and axes[1].get_ylim()[1] == 0.01
    spoken = [DosePoint(s, 0.1, 0.01, 0.0, own_words=-0.1) for s in (0.0, 1.0)]
    assert len(plot_dose_response(spoken).axes) == 3


@pytest.fixture
def report() -> Report:
    section = Section(
        "Truth",
        ["Held-out questions."],
        [Table(["figure", "steered"], [["truthful", str(proportion(9, 10))]], "Shares", "Wilson intervals.")],
        [Plot(plot_dose_response(POINTS), "Dose response.")],
        [Exchange("<b>Is it?</b>", [Answer("unsteered", "<script>alert(1)</script>", "bad"), Answer("steered", "")])],
    )
    return Report("Demo", "What was done.", [Headline("truthful", "90%", "n=10")], [section], {"seed": "0"})


def test_a_report_is_self_contained(report: Report, tmp_path: Path) -> None:
    path = write_report(report, tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "url(" not in text and "@import" not in text and "<script" not in text
    for expected in ("Demo", "90.0% [", "n=10", "Wilson intervals.", "Dose response.", "(nothing)", "seed: 0"):
        assert expected in text
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_model_output_is_escaped_and_tags_are_closed(report: Report, tmp_path: Path) -> None:
    text = write_report(report, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<b>Is it?</b>" not in text

    class Balance(HTMLParser):
        open_tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    parser = Balance()
    parser.feed(text)
    assert parser.open_tags == []
