"""Plots keep their numbers, say them in words, and are told apart without colour, on light and on dark pages."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from finesteer_hf.evaluation.measures.statistics import mean_with_interval, proportion
from finesteer_hf.method_api import DosePoint
from finesteer_hf.sites import Site
from finesteer_hf.views.by_token import AdapterReading, SteeredTokens
from finesteer_hf.views.plot_style import DARK, LIGHT, Drawn, Theme, png
from finesteer_hf.views.plots import (
    layer_figures,
    plot_dose_response,
    plot_effect_and_cost,
    plot_expert_use,
    plot_gate_roc,
    plot_gate_scores,
    plot_layer_screening,
    plot_shares,
    plot_tokens,
)


GENERATOR = np.random.default_rng(0)
POINTS = [DosePoint(s, s - 0.2 * s * s, 0.1, 0.01 * s) for s in np.linspace(0, 4, 5)]
SCORES = GENERATOR.normal(1, 1, 30), GENERATOR.normal(0, 1, 40)
SHARES = {"truthful": {"unsteered": proportion(0, 9), "steered": proportion(9, 9)}, "none": {}}
LAYERS = [{"layer": n, "r2": 0.1 * n, "separability": None, "gain": 1.0 - 0.1 * n} for n in range(2, 6)]
VIEW = SteeredTokens(
    tokens=("cost", " $5", "$x", "\n"),
    ids=(1, 2, 3, 4),
    prompt_length=2,
    sites=(Site("resid_post", 1), Site("resid_post", 2)),
    shares=torch.tensor([[0.0, 0.0], [0.1, 0.4], [0.2, 0.1], [0.0, 0.05]]),
    adapters=(AdapterReading("default", 1.0, 0.5, 2.0, (Site("resid_post", 1),), False),),
)
PLOTS: dict[str, Callable[..., Drawn]] = {
    "gate scores": partial(plot_gate_scores, *SCORES, threshold=0.5),
    "one score": partial(plot_gate_scores, [1.0, 1.0], []),
    "roc": partial(plot_gate_roc, {"state": SCORES, "ser": SCORES[::-1]}),
    "dose": partial(plot_dose_response, POINTS, chosen=2.0),
    "experts": partial(plot_expert_use, GENERATOR.dirichlet(np.ones(3), 20), [f"kind {i % 4}" for i in range(20)]),
    "shares": partial(plot_shares, SHARES),
    "costs": partial(plot_effect_and_cost, {"A": (mean_with_interval([0.1, 0.2, 0.4]), proportion(8, 9))}),
    "layers": partial(plot_layer_screening, LAYERS, chosen=[3]),
    "tokens": partial(plot_tokens, VIEW),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_the_same_each_time_and_dark_where_asked(name: str) -> None:
    light, again, dark = PLOTS[name](), PLOTS[name](), PLOTS[name](dark=True)
    first, second, third = (png(drawn.figure, dpi=40) for drawn in (light, again, dark))
    assert first.startswith(b"\x89PNG") and first == second != third
    assert light.alt == dark.alt and len(light.alt.split()) >= 8
    assert not re.search(r"\n|\bnan\b", light.alt)
    for drawn, theme in ((light, LIGHT), (dark, DARK)):
        assert drawn.figure.get_facecolor()[:3] == to_rgb(theme.paper)
        assert {text.get_color() for axis in drawn.figure.axes for text in axis.get_xticklabels()} <= {theme.ink}


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_seen_on_their_paper_and_need_no_colour_vision(theme: Theme) -> None:
    assert contrast(theme.ink, theme.paper) > 7 and contrast(theme.grey, theme.paper) > 4
    # The two that most plots use; later ones come with a marker or a line style of their own.
    assert all(contrast(colour, theme.paper) > 3 for colour in theme.palette[:2])
    looks = [look for look, _ in zip(theme.looks(), range(6), strict=False)]
    for part in zip(*looks, strict=True):
        assert len(set(part)) == 6


def test_a_dose_curve_keeps_its_numbers() -> None:
    figure, alt = plot_dose_response(POINTS, chosen=2.0)
    top, bottom = figure.axes
    np.testing.assert_allclose(top.lines[0].get_ydata(), [p.bottleneck for p in POINTS])
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), [p.kl for p in POINTS])
    assert bottom.get_ylim() == (0, pytest.approx(1.1 * 0.04))
    assert "least likely token: 0 at 0, to 0.8 at 4, lowest 0 at 0, highest 1.2 at 2." in alt
    assert "The chosen strength is 2." in alt


def test_rounding_is_invisible_and_one_point_is_not_a_curve() -> None:
    points = [DosePoint(s, 0.1, 0.01, 1e-8, own_words=-0.1 if s == 0 else None) for s in (0.0, 1.0, 2.0)]
    axes = plot_dose_response(points).figure.axes
    assert len(axes) == 2 and axes[1].get_ylim()[1] == 0.01
    assert "nats): 0 throughout." in plot_dose_response(points).alt
    spoken = [DosePoint(s, 0.1, 0.01, 0.0, own_words=-0.1) for s in (0.0, 1.0)]
    assert len(plot_dose_response(spoken).figure.axes) == 3


def test_the_words_of_the_gates_scores_are_counts() -> None:
    alt = plot_gate_scores([1.0, 2.0, 3.0, 4.0], [0.0, 2.0], threshold=2.0).alt
    assert "IR queries (n=4): 1 to 4, median 2.5, 75% at or above the threshold." in alt
    assert "General queries (n=2): 0 to 2, median 1, 50% at or above the threshold." in alt


def test_a_layer_table_is_drawn_whatever_a_method_measured() -> None:
    figure, alt = plot_layer_screening(LAYERS, chosen=[3])
    assert len(figure.axes) == 2, "a figure that was measured at no layer has no panel"
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.2, 0.3, 0.4, 0.5])
    assert "Figures of layers 2 to 5." in alt and "Held-out R²: highest at layer 5, 0.5; lowest 0.2." in alt
    assert alt.endswith("Steered: 3.")
    assert layer_figures({"layers": LAYERS}) == LAYERS
    assert layer_figures({}) == layer_figures({"layers": [3, 4]}) == layer_figures({"layers": [{"layer": 3}]}) == []
    with pytest.raises(ValueError, match="no figure beside"):
        plot_layer_screening([{"layer": 1, "r2": None}])


def test_tokens_are_drawn_with_their_largest_shares_and_with_dollars_as_dollars() -> None:
    figure, alt = plot_tokens(VIEW)
    (axis,) = figure.axes
    np.testing.assert_allclose([bar.get_height() for bar in axis.patches], [0.0, 0.4, 0.2, 0.05])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cost", " $5", "$x", "↵"]
    assert re.search(
        r"acted on 3 of 4 tokens, 1 of them in the prompt.*0\.4, at token 2, ' \$5', site resid_post\[2\]", alt
    )
