"""The gate's curve and the experts' bars say what the adapter decided."""

from __future__ import annotations

import re

import pytest
import torch

from finesteer_hf import CAAConfig, SteeringAdapter
from finesteer_hf.ui.answers import Question, Reading, answer_pair
from finesteer_hf.ui.gauges import BOTTOM, TOP, bar, expert_bars, gate_gauge, progress_bar, threshold_of
from finesteer_hf.ui.workbench import Workbench


def curve_of(html: str) -> list[tuple[float, float]]:
    """Points of the drawn gate: x and the gate."""
    points = re.findall(r"points='([^']+)'", html)[0].split()[1:-1]
    pairs = [tuple(map(float, point.split(","))) for point in points]
    return [(x, (BOTTOM - y) / (BOTTOM - TOP)) for x, y in pairs]


@pytest.mark.parametrize("question", ["Tell me something about shaved hair.", "What is 3 plus 4?"])
def test_the_question_lies_on_the_curve(mixing: Workbench, question: str) -> None:
    *_, last = answer_pair(mixing, Question(question, "mixture"))
    adapter = mixing.adapter("mixture")
    html = gate_gauge(adapter, last.reading)
    x, y = (float(value) for value in re.findall(r"cx='([\d.]+)' cy='([\d.]+)'", html)[0])
    curve = curve_of(html)
    nearest = min(curve, key=lambda point: abs(point[0] - x))
    assert last.reading is not None and last.reading.gate is not None
    assert (BOTTOM - y) / (BOTTOM - TOP) == pytest.approx(last.reading.gate, abs=0.01)
    assert nearest[1] == pytest.approx(last.reading.gate, abs=0.05)
    assert f"threshold {threshold_of(adapter):.3g}" in html
    assert f"gate {last.reading.gate:.2f}" in re.findall("aria-label='([^']+)'", html)[0]
    assert ("shut" if last.reading.gate == 0 else "open") in html
    assert ("is not added" in expert_bars(adapter, last.reading)) is (last.reading.gate == 0)


def test_the_threshold_is_where_the_curve_reaches_one(bench: Workbench) -> None:
    html = gate_gauge(bench.adapter("safety"), None)
    (line,) = re.findall(r"fs-threshold' x1='([\d.]+)'", html)
    curve = curve_of(html)
    step = curve[1][0] - curve[0][0]
    first = next(x for x, gate in curve if gate > 0.999)
    assert float(line) == pytest.approx(first, abs=2 * step)


def test_strength_zero_is_no_missing_gate(mixing: Workbench) -> None:
    adapter = mixing.adapter("mixture")
    assert "At strength 0" in gate_gauge(adapter, Reading()) and "At strength 0" in expert_bars(adapter, Reading())
    assert "steers every question" not in gate_gauge(adapter, Reading())


def test_bars_show_the_weights(mixing: Workbench) -> None:
    reading = Reading(gate=1.0, score=0.5, experts=(0.125, 0.5, 0.375, 0.0))
    html = expert_bars(mixing.adapter("mixture"), reading)
    assert re.findall(r"width:([\d.]+)%", html) == ["12.5", "50.0", "37.5", "0.0"]
    assert "50%" in html and "expert 4" in html
    assert "one map gives the vector" in expert_bars(mixing.adapter("safety"), reading)


def test_methods_without_gate_or_experts_say_so() -> None:
    adapter = SteeringAdapter(CAAConfig(), {"vectors": torch.ones(1, 4)})
    assert "steers every question" in gate_gauge(adapter, None)
    assert "steers every question" in gate_gauge(adapter, Reading(relative_norm=0.25))
    assert "25% of the state" in gate_gauge(adapter, Reading(relative_norm=0.25))
    assert "CAA adapter has no experts" in expert_bars(adapter, None)


def test_a_gate_without_a_score_is_a_bar() -> None:
    adapter = SteeringAdapter(CAAConfig(), {})
    assert "width:70.0%" in gate_gauge(adapter, Reading(gate=0.7))


def test_texts_are_escaped_and_shares_bounded() -> None:
    assert "&lt;b&gt;" in bar("<b>", 0.5, "") and "width:100.0%" in bar("", 7, "") and "width:0.0%" in bar("", -1, "")
    assert "reading &amp; running" in progress_bar("reading & running", 0.5, "1 of 2")
