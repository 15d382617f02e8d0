"""Plots of adapters and of what they do; each is a figure and a text that says what it shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_curve

from finesteer_hf.evaluation.gates import auroc
from finesteer_hf.evaluation.measures.statistics import Mean, Proportion
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import LEADING, Criterion
from finesteer_hf.views.by_token import SteeredTokens
from finesteer_hf.views.plot_style import Drawn, theme
from finesteer_hf.views.token_text import shown


# Smallest range of a divergence axis, in nats.
LEAST_KL = 0.01
LEADING_NAMES: dict[Criterion, str] = {
    "sayable": "p of the wanted answers'\nleast likely token",
    "wanted": "p(own answers are of\nthe wanted kind)",
    "preference": "p(chosen beats rejected),\nper token",
}
# What the figures of a layer are called on an axis.
LAYER_FIGURES = {
    "r2": "held-out R²",
    "ridge_r2": "held-out R²",
    "separability": "AUROC of queries\nagainst general prompts",
    "gain": "first-order gain,\nnats per token",
    "probe_accuracy": "accuracy of probes",
}


def plot_gate_scores(
    ir: ArrayLike,
    general: ArrayLike,
    *,
    threshold: float | None = None,
    score: str = "gate score",
    dark: bool = False,
) -> Drawn:
    """Distributions of the gate's score on IR and on general queries, with the threshold.

    Args:
        ir: scores of held-out IR queries, `[n]`.
        general: scores of held-out general queries, `[m]`.
        threshold: score from which the gate is open.
        score: name of the score, for the axis.
        dark: whether it is for a dark page.
    """
    look = theme(dark)
    figure, (axis,) = look.axes(6.4, 3.2)
    a, b = np.asarray(ir, dtype=float).ravel(), np.asarray(general, dtype=float).ravel()
    both = np.r_[a, b] if threshold is None else np.r_[a, b, threshold]
    bins = np.linspace(both.min(), both.max(), 41) if np.ptp(both) > 0 else both[0] + np.linspace(-0.5, 0.5, 11)
    said = [f"Histograms of the {score}."]
    for values, colour, name, hatch in ((b, look.palette[3], "general", "//"), (a, look.palette[0], "IR", "")):
        if values.size:
            weights = np.full(values.size, 1 / values.size)
            label = f"{name} queries (n={values.size})"
            style: dict[str, Any] = {"color": colour, "alpha": 0.65, "hatch": hatch, "edgecolor": look.paper}
            axis.hist(values, bins.tolist(), weights=weights, label=label, **style)
            middle = f"{label}: {values.min():.3g} to {values.max():.3g}, median {np.median(values):.3g}"
            opens = "" if threshold is None else f", {np.mean(values >= threshold):.0%} at or above the threshold"
            said.append(f"{_sentence(middle)}{opens}.")
    if threshold is not None:
        axis.axvline(threshold, color=look.ink, linewidth=1.5, linestyle="--", label=f"threshold {threshold:.3g}")
        said.append(f"A dashed line marks the threshold, {threshold:.3g}.")
    axis.set_xlabel(score)
    axis.set_ylabel("share of queries")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    # Outside: both distributions may fill the axes.
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return look.finish(figure, " ".join(said))


def plot_gate_roc(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], *, dark: bool = False) -> Drawn:
    """ROC curves of gate scores: share of IR queries caught against share of general queries disturbed.

    Args:
        scores: for each name, the scores of held-out IR queries and of general queries.
        dark: whether it is for a dark page.
    """
    look = theme(dark)
    figure, (axis,) = look.axes(4.6, 4.2)
    areas = {}
    for (name, (ir, general)), line in zip(scores.items(), look.looks(), strict=False):
        a, b = np.asarray(ir, dtype=float).ravel(), np.asarray(general, dtype=float).ravel()
        false_rate, true_rate, _ = roc_curve(np.r_[np.ones(a.size), np.zeros(b.size)], np.r_[a, b])
        areas[name] = auroc(a, b)
        label = f"{name} (AUROC {areas[name]:.3f})"
        axis.plot(false_rate, true_rate, color=line.colour, linestyle=line.line, linewidth=2, label=label)
    axis.plot([0, 1], [0, 1], color=look.grey, linewidth=0.8, linestyle=":")
    axis.set_xlabel("general queries on which the gate fires")
    axis.set_ylabel("IR queries on which it fires")
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    listed = ", ".join(f"{name} {area:.3f}" for name, area in areas.items())
    return look.finish(figure, f"ROC curves of gate scores, IR against general queries; areas: {listed}.")


def plot_dose_response(
    points: Sequence[DosePoint],
    *,
    chosen: float | None = None,
    leads: Criterion = "sayable",
    dark: bool = False,
) -> Drawn:
    """The figure that a strength was chosen by, and its costs: divergence on general prompts, and the model's own
    words.

    Args:
        points: the curve.
        chosen: the chosen strength.
        leads: the figure that it was chosen by.
        dark: whether it is for a dark page.
    """
    look = theme(dark)
    spoken = [point for point in points if point.own_words is not None]
    # One point, the unsteered model's, is not a curve.
    spoken = spoken if len(spoken) > 1 else []
    figure, axes = look.axes(6.4, 4.6 + 1.8 * bool(spoken), 2 + bool(spoken), sharex=True)
    strength = np.array([point.strength for point in points])
    figures = LEADING[leads][:2]
    # A point whose own answers were not needed has no judgement: a gap in the curve.
    value, error = (np.array([getattr(point, name) for point in points], dtype=float) for name in figures)
    kl = np.array([point.kl for point in points])
    words = np.array([point.own_words for point in spoken], dtype=float)
    style: dict[str, Any] = {"markersize": 4, "linewidth": 2}
    first, second, third = look.palette[0], look.palette[1], look.grey
    axes[0].fill_between(strength, value - error, value + error, color=first, alpha=0.2, linewidth=0)
    axes[0].plot(strength, value, color=first, marker="o", **style)
    name = LEADING_NAMES[leads]
    axes[0].set_ylabel(f"{name}\n(band: 1 SE)", fontsize=9)
    # A gate that stays shut gives a line on the axis, which should not be cut in half.
    axes[1].plot(strength, kl, color=second, marker="s", linestyle="--", clip_on=False, zorder=3, **style)
    axes[1].set_ylabel("KL on general\nprompts, p95, nats", fontsize=9)
    # Rounding errors, about 1e-8 nats, must not fill the panel.
    axes[1].set_ylim(0, max(1.1 * max(kl, default=0.0), LEAST_KL))
    said = [_curve(name, strength, value), _curve("KL on general prompts (95th percentile, nats)", strength, kl)]
    if leads == "sayable":
        axes[0].set_ylim(bottom=0)
    if spoken:
        at = np.array([point.strength for point in spoken])
        axes[2].plot(at, words, color=third, marker="^", linestyle="-.", **style)
        axes[2].set_ylabel("own words under the\nbase, nats per token", fontsize=9)
        said.append(_curve("log-likelihood of the model's own words under the base (nats per token)", at, words))
    axes[-1].set_xlabel("strength")
    if chosen is not None:
        for axis in axes:
            axis.axvline(chosen, color=look.ink, linestyle="--", linewidth=1.2)
        axes[0].annotate(f" chosen: {chosen:g}", (chosen, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9)
        said.append(f"The chosen strength is {chosen:g}.")
    return look.finish(figure, " ".join(["Dose response: curves over the strength.", *said]))


def _curve(name: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """A curve in words: where it starts and ends, and its extremes."""
    # Rounding errors are not worth a word.
    name, y = _sentence(" ".join(name.split())), np.round(y, 6)
    if np.isnan(y).all():
        return f"{name}: no figures."
    low, high = int(np.nanargmin(y)), int(np.nanargmax(y))
    if y[low] == y[high]:
        return f"{name}: {y[low]:.3g} throughout."
    places = {"": 0, "to ": -1, "lowest ": low, "highest ": high}
    return f"{name}: {', '.join(f'{what}{y[at]:.3g} at {x[at]:.3g}' for what, at in places.items())}."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def plot_expert_use(weights: ArrayLike, groups: Sequence[str], *, dark: bool = False) -> Drawn:
    """Mean routing weight of each expert in each group of queries.

    Args:
        weights: routing weights, `[rows, experts]`.
        groups: the group of each row, such as the question's category.
        dark: whether it is for a dark page.
    """
    look = theme(dark)
    matrix = np.asarray(weights, dtype=float)
    names = sorted(set(groups))
    owner = np.array([names.index(group) for group in groups])
    means = np.stack([matrix[owner == index].mean(0) for index in range(len(names))])
    figure, (axis,) = look.axes(1.8 + 0.55 * max(matrix.shape[1], 4), 1.2 + 0.3 * len(names))
    image = axis.imshow(means, cmap="cividis", vmin=0, vmax=max(means.max(), 1e-9), aspect="auto")
    axis.grid(False)
    axis.set_yticks(range(len(names)), names)
    axis.set_xticks(range(matrix.shape[1]), [str(index + 1) for index in range(matrix.shape[1])])
    axis.set_xlabel("expert")
    bar = figure.colorbar(image, ax=axis, label="mean routing weight")
    bar.ax.tick_params(colors=look.ink)
    most = ", ".join(f"{name} {row.argmax() + 1} ({row.max():.2f})" for name, row in zip(names, means, strict=True))
    alt = f"Heat map of the mean routing weight of {matrix.shape[1]} experts. Most used expert of each group: {most}."
    return look.finish(figure, alt)


def layer_figures(report: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """The figures of layers in a fit's report, for `plot_layer_screening`; empty where the method keeps none."""
    table = report.get("layers")
    rows = [row for row in table if isinstance(row, dict) and "layer" in row] if isinstance(table, list) else []
    numbers = [
        {k: v for k, v in row.items() if v is None or (isinstance(v, (int, float)) and not isinstance(v, bool))}
        for row in rows
    ]
    return [row for row in numbers if any(v is not None for k, v in row.items() if k != "layer")]


def plot_layer_screening(
    table: Sequence[Mapping[str, float | None]], *, chosen: Collection[int] = (), dark: bool = False
) -> Drawn:
    """What a fit measured at each layer before it chose where to steer.

    Args:
        table: one row a layer: `layer` and any figures, such as `fit.report.layers` of an adapter; None where a figure
            was not measured.
        chosen: the layers that are steered, marked.
        dark: whether it is for a dark page.

    Raises:
        ValueError: if no figure was measured.
    """
    look = theme(dark)
    names = [name for name in table[0] if name != "layer" and any(row.get(name) is not None for row in table)]
    if not names:
        raise ValueError("The table has no figure beside `layer`; nothing can be drawn.")
    figure, axes = look.axes(6.4, 1.0 + 1.7 * len(names), len(names), sharex=True)
    said = []
    for axis, name, line in zip(axes, names, look.looks(), strict=False):
        rows = [(row["layer"], row[name]) for row in table if row.get(name) is not None]
        x, y = np.array(rows, dtype=float).T
        style: dict[str, Any] = {"color": line.colour, "linestyle": line.line, "marker": line.marker}
        axis.plot(x, y, markersize=5, linewidth=1.5, **style)
        label = LAYER_FIGURES.get(name, name.replace("_", " "))
        axis.set_ylabel(label, fontsize=9)
        for layer in chosen:
            axis.axvline(layer, color=look.grey, linewidth=6, alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        best = f"highest at layer {x[y.argmax()]:.0f}, {y.max():.3g}; lowest {y.min():.3g}"
        said.append(f"{_sentence(' '.join(label.split()))}: {best}.")
    axes[-1].set_xlabel("layer (grey: steered)" if chosen else "layer")
    if chosen:
        said.append(f"Steered: {', '.join(str(layer) for layer in sorted(chosen))}.")
    first, last = min(row["layer"] or 0 for row in table), max(row["layer"] or 0 for row in table)
    return look.finish(figure, " ".join([f"Figures of layers {first:g} to {last:g}.", *said]))


def plot_tokens(view: SteeredTokens, *, dark: bool = False) -> Drawn:
    """Each token's largest share |delta| / |h|: prompt and answer, the query marked.

    Args:
        view: what `steering_by_token` returned.
        dark: whether it is for a dark page.
    """
    look = theme(dark)
    largest, places = view.largest.numpy(), np.arange(len(view.tokens))
    figure, (axis,) = look.axes(max(4.0, 1.0 + 0.2 * len(places)), 3.2)
    for part, colour, hatch in (("prompt", look.palette[3], "//"), ("answer", look.palette[0], "")):
        mine = (places < view.prompt_length) == (part == "prompt")
        axis.bar(places[mine], largest[mine], color=colour, hatch=hatch, edgecolor=look.paper, label=part, width=0.9)
    arrow = {"arrowstyle": "-|>", "color": look.ink}
    above: dict[str, Any] = {"xytext": (0, 22), "textcoords": "offset points", "ha": "center", "arrowprops": arrow}
    axis.annotate("query", (view.query, float(largest[view.query])), fontsize=8, **above)
    axis.set_xticks(places, [shown(token) for token in view.tokens], rotation=90, fontsize=7)
    axis.set_xlim(-0.7, len(places) - 0.3)
    axis.set_ylim(0, 1.2 * view.deepest_colour)
    axis.set_ylabel("|delta| / |h|,\nlargest over sites", fontsize=9)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return look.finish(figure, view.describe())


def plot_effect_and_cost(
    points: Mapping[str, tuple[Mean, Proportion]],
    *,
    effect: str = "change of MC2",
    cost: str = "general answers changed",
    dark: bool = False,
) -> Drawn:
    """Each method's gain against what it changes elsewhere; the best place is at the top left.

    Args:
        points: for each method, the change of its effect and the share of general prompts whose answer stays the same.
        effect: name of the effect, for the axis.
        cost: name of the cost, for the axis.
        dark: whether it is for a dark page.
    """
    look = theme(dark)
    figure, (axis,) = look.axes(6.8, 4.4)
    said = []
    for (name, (gain, same)), mark in zip(points.items(), look.looks(), strict=False):
        up_down = np.clip([[gain.value - gain.low], [gain.high - gain.value]], 0, None)
        sideways = np.clip([[same.high - same.value], [same.value - same.low]], 0, None)
        style: dict[str, Any] = {"fmt": mark.marker, "color": mark.colour, "capsize": 3, "markersize": 7}
        axis.errorbar(1 - same.value, gain.value, up_down, sideways, label=name, **style)
        said.append(f"{name}: {effect} {gain.value:+.3f}, {cost} {1 - same.value:.0%}.")
    axis.axhline(0, color=look.grey, linewidth=0.8, linestyle=":")
    axis.set_xlabel(cost)
    axis.set_ylabel(effect)
    axis.set_xlim(-0.02, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper center", ncols=min(max(len(points), 1), 4), frameon=False, fontsize=9)
    return look.finish(figure, " ".join([f"Points with 95% intervals, {effect} against {cost}.", *said]))


def plot_shares(shares: Mapping[str, Mapping[str, Proportion | Mean]], *, dark: bool = False) -> Drawn:
    """Shares with their intervals, conditions side by side.

    Args:
        shares: figure name -> condition name -> share, or a mean between 0 and 1.
        dark: whether it is for a dark page.
    """
    look = theme(dark)
    conditions = list(dict.fromkeys(name for row in shares.values() for name in row))
    figure, (axis,) = look.axes(6.8, 0.9 + 0.62 * len(shares))
    for index, (condition, mark) in enumerate(zip(conditions, look.looks(), strict=False)):
        offset = (index - (len(conditions) - 1) / 2) * 0.22
        rows = [(place, row[condition]) for place, row in enumerate(shares.values()) if condition in row]
        rows = [(place, share) for place, share in rows if share.n]
        values = np.array([share.value for _, share in rows])
        low = values - np.array([share.low for _, share in rows])
        high = np.array([share.high for _, share in rows]) - values
        places = np.array([place + offset for place, _ in rows])
        # Rounding may move a bound slightly past the value.
        error = np.clip(np.stack([low, high]), 0, None) if rows else None
        style: dict[str, Any] = {"fmt": mark.marker, "color": mark.colour, "capsize": 3, "markersize": 6}
        axis.errorbar(values, places, xerr=error, label=condition, **style)
    axis.set_yticks(range(len(shares)), list(shares))
    axis.set_ylim(len(shares) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="x", color=look.grid, linewidth=0.8)
    axis.grid(axis="y", visible=False)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper center", ncols=max(len(conditions), 1), frameon=False, fontsize=9)
    said = [
        f"{name}: {', '.join(f'{condition} {share.value:.0%}' for condition, share in row.items() if share.n)}."
        for name, row in shares.items()
        if any(share.n for share in row.values())
    ]
    return look.finish(figure, " ".join(["Shares with 95% intervals.", *said]))
