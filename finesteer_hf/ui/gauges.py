"""The gate and the experts as HTML: readable in light and dark, and with every number in words."""

from __future__ import annotations

import math
from html import escape

import torch

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.estimators import GATE_FUNCTIONS
from finesteer_hf.methods.query_gate import QueryGateConfig, from_file
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS
from finesteer_hf.ui.answers import Reading


# The picture's size, and the plot inside it, in the units of its view box.
WIDTH, HEIGHT = 320, 116
LEFT, RIGHT, TOP, BOTTOM = 26, 310, 24, 94
POINTS = 240

CSS = """
.fs { --fs-ink: #1f2328; --fs-soft: #5b6470; --fs-line: #c5ccd3; --fs-act: #0072B2; --fs-mark: #D55E00;
      color: var(--fs-ink); font-size: 14px; line-height: 1.45; }
.dark .fs { --fs-ink: #e6e9ec; --fs-soft: #a3adb8; --fs-line: #4a535d; --fs-act: #56B4E9; --fs-mark: #E69F00; }
.fs h4 { margin: 0 0 6px; font-size: 14px; font-weight: 600; color: var(--fs-ink); }
.fs p { margin: 4px 0 0; color: var(--fs-ink); }
.fs .fs-soft { color: var(--fs-soft); }
.fs svg { width: 100%; max-width: 560px; height: auto; display: block; }
.fs svg text { fill: var(--fs-soft); font-size: 11px; font-family: inherit; }
.fs svg .fs-area { fill: var(--fs-act); fill-opacity: .25; stroke: var(--fs-act); stroke-width: 1.5; }
.fs svg .fs-axis { stroke: var(--fs-line); }
.fs svg .fs-threshold { stroke: var(--fs-soft); stroke-dasharray: 4 3; }
.fs svg .fs-dot { fill: var(--fs-mark); stroke: var(--fs-ink); }
.fs .fs-bar { display: grid; grid-template-columns: 5.5em 1fr 3.5em; gap: 8px; align-items: center; margin: 3px 0; }
.fs .fs-bar:has(> span:first-child:empty) { grid-template-columns: 0 1fr 7em; }
.fs .fs-bar > div { background: var(--fs-line); border-radius: 3px; height: 12px; overflow: hidden; }
.fs .fs-bar > div > div { background: var(--fs-act); height: 100%; }
.fs .fs-bar span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
"""


def gate_gauge(adapter: SteeringAdapter, reading: Reading | None) -> str:
    """The gate as a curve over the score, with threshold and question; a bar where there is no such curve.

    Args:
        adapter: the adapter whose gate it is.
        reading: what it decided about the question; None: the curve alone.
    """
    config = adapter.config
    gated = isinstance(config, QueryGateConfig) and config.gate != "always"
    if gated:
        return panel("Gate", _curve(adapter, reading) + _in_words(adapter, reading))
    if reading is None:
        return panel(
            "Gate", "<p class='fs-soft'>Ask something to see what the gate says.</p>" if gated else _ungated()
        )
    if reading.gate is None:
        return panel("Gate", _ungated() + _size(reading))
    return panel("Gate", bar("gate", reading.gate, f"{reading.gate:.2f}") + _size(reading))


def expert_bars(adapter: SteeringAdapter, reading: Reading | None) -> str:
    """The routing weights of the experts as bars.

    Args:
        adapter: the adapter whose experts they are.
        reading: what it decided about the question; None before the first question.
    """
    if "router.weight" not in adapter.tensors:
        kind = "has no experts: one map gives the vector"
        if getattr(adapter.config, "experts", None) is None:
            kind = "has no experts"
        return panel("Experts", f"<p class='fs-soft'>This {escape(adapter.config.steering_type)} adapter {kind}.</p>")
    if reading is None:
        return panel("Experts", "<p class='fs-soft'>Ask something to see which experts make the vector.</p>")
    if not reading.experts:
        return panel("Experts", "<p class='fs-soft'>At strength 0 they are not asked.</p>")
    bars = [bar(f"expert {i + 1}", weight, f"{weight:.0%}") for i, weight in enumerate(reading.experts)]
    shut = "<p class='fs-soft'>The gate is shut, so their vector is not added.</p>" if reading.gate == 0 else ""
    return panel("Experts", "".join(bars) + shut)


def bar(label: str, share: float, said: str) -> str:
    """A bar of a share in [0, 1], with its label and its number."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f"<div class='fs-bar'><span>{escape(label)}</span><div><div style='width:{width:.1f}%'></div></div>"
        f"<span>{escape(said)}</span></div>"
    )


def progress_bar(task: str, share: float, said: str) -> str:
    """How far a task is, with its name above the bar."""
    return f"<div class='fs'><p>{escape(task)}</p>{bar('', share, said)}</div>"


def panel(title: str, content: str) -> str:
    """HTML under a title, with the styles of `CSS`; neither is escaped."""
    return f"<div class='fs'><h4>{title}</h4>{content}</div>"


def _ungated() -> str:
    return "<p>No gate: this adapter steers every question.</p>"


def _size(reading: Reading) -> str:
    if reading.relative_norm is None:
        return ""
    return f"<p class='fs-soft'>What is added is {reading.relative_norm:.0%} of the state's norm.</p>"


def _in_words(adapter: SteeringAdapter, reading: Reading | None) -> str:
    if reading is None:
        return "<p class='fs-soft'>Ask something to see where its score falls.</p>"
    if reading.gate is None or reading.score is None:
        return "<p class='fs-soft'>At strength 0 nothing is read and nothing is added.</p>"
    state = "shut" if reading.gate == 0 else "open" if reading.gate == 1 else "partly open"
    threshold = threshold_of(adapter)
    beside = "" if threshold is None else f", fully open from {threshold:.3g}"
    return f"<p>Gate <b>{reading.gate:.2f}</b>, {state}: score {reading.score:.3g}{beside}.</p>{_size(reading)}"


def threshold_of(adapter: SteeringAdapter) -> float | None:
    """The score from which the gate is fully open; None if there is none, or every score opens it."""
    threshold = adapter.tensors.get("gate.threshold")
    return None if threshold is None or not math.isfinite(float(threshold)) else float(threshold)


def score_range(adapter: SteeringAdapter, reading: Reading | None) -> tuple[float, float]:
    """The scores that the gauge shows: calibration rows, threshold and question, with a margin."""
    tensors = adapter.tensors
    known = [
        tensors[name].reshape(-1) for name in ("gate.calibration", "gate.threshold", "gate.floor") if name in tensors
    ]
    if "gate.slope" in tensors:
        # The logistic gate goes from 0.02 to 0.98 between these.
        slope = float(tensors["gate.slope"]) or 1.0
        known.append((torch.tensor([-4.0, 4.0]) - tensors["gate.intercept"].float()) / slope)
    values = [float(value) for part in known for value in part.tolist() if math.isfinite(value)]
    values += [] if reading is None or reading.score is None else [reading.score]
    values = values or [0.0, 1.0]
    low, high = min(values), max(values)
    margin = 0.03 * (high - low) or 0.5
    return low - margin, high + margin


def _curve(adapter: SteeringAdapter, reading: Reading | None) -> str:
    config = adapter.config
    assert isinstance(config, QueryGateConfig)
    low, high = score_range(adapter, reading)
    scores = torch.linspace(low, high, POINTS)
    tensors = {name: tensor.float() for name, tensor in adapter.tensors.items() if name.startswith("gate.")}
    gates = GATE_FUNCTIONS[config.gate](scores, **from_file(GATE_TENSORS[config.gate], tensors)).tolist()

    def x(score: float) -> float:
        return LEFT + (score - low) / (high - low) * (RIGHT - LEFT)

    def y(gate: float) -> float:
        return BOTTOM - gate * (BOTTOM - TOP)

    line = " ".join(f"{x(s):.1f},{y(g):.1f}" for s, g in zip(scores.tolist(), gates, strict=True))
    parts = [
        f"<polygon class='fs-area' points='{LEFT},{BOTTOM} {line} {RIGHT},{BOTTOM}'/>",
        f"<line class='fs-axis' x1='{LEFT}' y1='{BOTTOM}' x2='{RIGHT}' y2='{BOTTOM}'/>",
        _label(LEFT, BOTTOM + 15, f"{low:.2g}", "start"),
        _label((LEFT + RIGHT) / 2, BOTTOM + 15, "score of the question", "middle"),
        _label(RIGHT, BOTTOM + 15, f"{high:.2g}", "end"),
        _label(LEFT - 6, BOTTOM + 4, "0", "end"),
        _label(LEFT - 6, TOP + 4, "1", "end"),
    ]
    threshold, said = threshold_of(adapter), f"Gate of the adapter over scores from {low:.2g} to {high:.2g}"
    if threshold is not None:
        at = x(threshold)
        side: tuple[float, str] = (at + 5, "start") if at < (LEFT + RIGHT) / 2 else (at - 5, "end")
        parts += [
            f"<line class='fs-threshold' x1='{at:.1f}' y1='{TOP - 8}' x2='{at:.1f}' y2='{BOTTOM}'/>",
            _label(side[0], TOP - 10, f"threshold {threshold:.3g}", side[1]),
        ]
        said += f", fully open from {threshold:.3g}"
    if reading is not None and reading.score is not None and reading.gate is not None:
        parts.append(f"<circle class='fs-dot' cx='{x(reading.score):.1f}' cy='{y(reading.gate):.1f}' r='6'/>")
        said += f"; the question has score {reading.score:.3g} and gate {reading.gate:.2f}"
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(said, quote=True)}'>{''.join(parts)}</svg>"


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'>{escape(text)}</text>"
