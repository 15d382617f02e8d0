"""Plots of gates, experts and doses; drawn without a display, in colour-blind-safe colours."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike
from sklearn.metrics import roc_curve

from finesteer_hf.evaluation.gates import auroc
from finesteer_hf.evaluation.measures.statistics import Mean, Proportion
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import Criterion


# Okabe and Ito's palette without yellow, which is too light for lines.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
INK, GREY = "#222222", "#8a8a8a"
# Smallest range of a divergence axis, in nats.
LEAST_KL = 0.01
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
# Line styles as well as colours, for black-and-white prints.
_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def png(figure: Figure, *, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # No software version in the metadata: the same figure gives the same bytes.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _axes(width: float, height: float, rows: int = 1, *, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, 1, sharex=sharex, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, labelsize=9)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, list(axes)


def plot_gate_scores(
    ir: ArrayLike, general: ArrayLike, *, threshold: float | None = None, score: str = "gate score"
) -> Figure:
    """Distributions of the gate's score on IR and on general queries, with the threshold.

    Args:
        ir: scores of held-out IR queries, `[n]`.
        general: scores of held-out general queries, `[m]`.
        threshold: score from which the gate is open.
        score: name of the score, for the axis.
    """
    figure, (axis,) = _axes(6.4, 3.2)
    a, b = np.asarray(ir, dtype=float).ravel(), np.asarray(general, dtype=float).ravel()
    both = np.r_[a, b] if threshold is None else np.r_[a, b, threshold]
    bins = np.linspace(both.min(), both.max(), 41) if np.ptp(both) > 0 else both[0] + np.linspace(-0.5, 0.5, 11)
    for values, colour, name, hatch in ((b, ORANGE, "general", "//"), (a, BLUE, "IR", "")):
        if values.size:
            weights = np.full(values.size, 1 / values.size)
            label = f"{name} queries (n={values.size})"
            axis.hist(
                values,
                bins.tolist(),
                weights=weights,
                color=colour,
                alpha=0.65,
                label=label,
                hatch=hatch,
                edgecolor="white",
            )
    if threshold is not None:
        axis.axvline(threshold, color=INK, linewidth=1.5, linestyle="--", label=f"threshold {threshold:.3g}")
    axis.set_xlabel(score)
    axis.set_ylabel("share of queries")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False, fontsize=9)
    return figure


def plot_gate_roc(scores: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """ROC curves of gate scores: share of IR queries caught against share of general queries disturbed.

    Args:
        scores: for each name, the scores of held-out IR queries and of general queries.
    """
    figure, (axis,) = _axes(4.6, 4.2)
    looks = zip(cycle(PALETTE), cycle(_STYLES), strict=False)
    for (name, (ir, general)), (colour, style) in zip(scores.items(), looks, strict=False):
        a, b = np.asarray(ir, dtype=float).ravel(), np.asarray(general, dtype=float).ravel()
        false_rate, true_rate, _ = roc_curve(np.r_[np.ones(a.size), np.zeros(b.size)], np.r_[a, b])
        label = f"{name} (AUROC {auroc(a, b):.3f})"
        axis.plot(false_rate, true_rate, color=colour, linestyle=style, linewidth=2, label=label)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xlabel("general queries on which the gate fires")
    axis.set_ylabel("IR queries on which it fires")
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def plot_dose_response(
    points: Sequence[DosePoint], *, chosen: float | None = None, leads: Criterion = "sayable"
) -> Figure:
    """The figure that a strength was chosen by, and its costs: divergence on general prompts, and the model's own
    words.

    Args:
        points: the curve.
        chosen: the chosen strength.
        leads: the figure that it was chosen by.
    """
    spoken = [point for point in points if point.own_words is not None]
    # One point, the unsteered model's, is not a curve.
    spoken = spoken if len(spoken) > 1 else []
    figure, axes = _axes(6.4, 4.6 + 1.8 * bool(spoken), 2 + bool(spoken), sharex=True)
    strength = np.array([point.strength for point in points])
    sayable = leads == "sayable"
    value = np.array([point.bottleneck if sayable else point.preference for point in points])
    error = np.array([point.bottleneck_se if sayable else point.preference_se for point in points])
    axes[0].fill_between(strength, value - error, value + error, color=BLUE, alpha=0.2, linewidth=0)
    axes[0].plot(strength, value, color=BLUE, marker="o", markersize=4, linewidth=2)
    name = "p of the wanted answers'\nleast likely token" if sayable else "p(chosen beats rejected),\nper token"
    axes[0].set_ylabel(f"{name}\n(band: 1 SE)", fontsize=9)
    axes[1].plot(strength, [point.kl for point in points], color=VERMILION, marker="s", markersize=4, linewidth=2)
    axes[1].set_ylabel("KL on general\nprompts, p95, nats", fontsize=9)
    # Rounding errors, about 1e-8 nats, must not fill the panel.
    axes[1].set_ylim(0, max(1.1 * max((point.kl for point in points), default=0.0), LEAST_KL))
    if sayable:
        axes[0].set_ylim(bottom=0)
    if spoken:
        words = [point.own_words for point in spoken]
        axes[2].plot([point.strength for point in spoken], words, color=GREY, marker="^", markersize=4, linewidth=2)  # type: ignore[arg-type]
        axes[2].set_ylabel("own words under the\nbase, nats per token", fontsize=9)
    axes[-1].set_xlabel("strength")
    if chosen is not None:
        for axis in axes:
            axis.axvline(chosen, color=INK, linestyle="--", linewidth=1.2)
        axes[0].annotate(f" chosen: {chosen:g}", (chosen, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
    return figure


def plot_expert_use(weights: ArrayLike, groups: Sequence[str]) -> Figure:
    """Mean routing weight of each expert in each group of queries.

    Args:
        weights: routing weights, `[rows, experts]`.
        groups: the group of each row, such as the question's category.
    """
    matrix = np.asarray(weights, dtype=float)
    names = sorted(set(groups))
    owner = np.array([names.index(group) for group in groups])
    means = np.stack([matrix[owner == index].mean(0) for index in range(len(names))])
    figure, (axis,) = _axes(1.8 + 0.55 * max(matrix.shape[1], 4), 1.2 + 0.3 * len(names))
    image = axis.imshow(means, cmap="cividis", vmin=0, vmax=max(means.max(), 1e-9), aspect="auto")
    axis.grid(False)
    axis.set_yticks(range(len(names)), names)
    axis.set_xticks(range(matrix.shape[1]), [str(index + 1) for index in range(matrix.shape[1])])
    axis.set_xlabel("expert")
    figure.colorbar(image, ax=axis, label="mean routing weight")
    return figure


def plot_effect_and_cost(
    points: Mapping[str, tuple[Mean, Proportion]],
    *,
    effect: str = "change of MC2",
    cost: str = "general answers changed",
) -> Figure:
    """Each method's gain against what it changes elsewhere; the best place is at the top left.

    Args:
        points: for each method, the change of its effect and the share of general prompts whose answer stays the same.
        effect: name of the effect, for the axis.
        cost: name of the cost, for the axis.
    """
    figure, (axis,) = _axes(6.8, 4.4)
    looks = zip(cycle(PALETTE), cycle("osD^vP"), strict=False)
    for (name, (gain, same)), (colour, marker) in zip(points.items(), looks, strict=False):
        up_down = np.clip([[gain.value - gain.low], [gain.high - gain.value]], 0, None)
        sideways = np.clip([[same.high - same.value], [same.value - same.low]], 0, None)
        axis.errorbar(
            1 - same.value,
            gain.value,
            up_down,
            sideways,
            fmt=marker,
            color=colour,
            capsize=3,
            markersize=7,
            label=name,
        )
    axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xlabel(cost)
    axis.set_ylabel(effect)
    axis.set_xlim(-0.02, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper center", ncols=min(max(len(points), 1), 4), frameon=False, fontsize=9)
    return figure


def plot_shares(shares: Mapping[str, Mapping[str, Proportion | Mean]]) -> Figure:
    """Shares with their intervals, conditions side by side.

    Args:
        shares: figure name -> condition name -> share, or a mean between 0 and 1.
    """
    conditions = list(dict.fromkeys(name for row in shares.values() for name in row))
    figure, (axis,) = _axes(6.8, 0.9 + 0.62 * len(shares))
    looks = zip(cycle(PALETTE), cycle("osD^vP"), strict=False)
    for index, (condition, (colour, marker)) in enumerate(zip(conditions, looks, strict=False)):
        offset = (index - (len(conditions) - 1) / 2) * 0.22
        rows = [(place, row[condition]) for place, row in enumerate(shares.values()) if condition in row]
        rows = [(place, share) for place, share in rows if share.n]
        values = np.array([share.value for _, share in rows])
        low = values - np.array([share.low for _, share in rows])
        high = np.array([share.high for _, share in rows]) - values
        places = np.array([place + offset for place, _ in rows])
        # Rounding may move a bound slightly past the value.
        error = np.clip(np.stack([low, high]), 0, None) if rows else None
        axis.errorbar(values, places, xerr=error, fmt=marker, color=colour, capsize=3, markersize=6, label=condition)
    axis.set_yticks(range(len(shares)), list(shares))
    axis.set_ylim(len(shares) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper center", ncols=max(len(conditions), 1), frameon=False, fontsize=9)
    return figure
