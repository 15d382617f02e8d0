"""The card's text before its tables: what the adapter does, an example, what it costs, what was not tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.hub.card_facts import base_name, share_text


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter


_LONGEST_ANSWER, _MOST_EXAMPLES = 400, 3


@dataclass(frozen=True)
class Example:
    """A prompt with its answers, all strings.

    Attributes:
        prompt: the prompt.
        unsteered: the base model's answer.
        steered: the answer with the adapter.
        remark: the prompt's source and the gate's value.
    """

    prompt: str
    unsteered: str
    steered: str
    remark: str


@dataclass(frozen=True)
class Story:
    """The text of a card.

    Attributes:
        what: what the adapter does, in a sentence or two.
        effect: the first figure with both conditions; empty if there is none.
        examples: prompts with both answers, if any were recorded.
        costs: memory, and unwanted changes.
        untested: what the figures do not cover.
    """

    what: str
    effect: str
    examples: list[Example]
    costs: list[str]
    untested: list[str]


def tell(adapter: SteeringAdapter) -> Story:
    """Describe an adapter's config and tensors in words; figures in a form that no fit writes are left out."""
    fit = adapter.config.fit
    report = _mapping(fit.get("report"))
    evaluation = [row for row in _list(fit.get("evaluation")) if isinstance(row, dict)]
    return Story(
        what=_what(adapter, _mapping(report.get("gate"))),
        effect=_effect(evaluation),
        examples=[found for found in map(_example, _list(fit.get("examples"))[:_MOST_EXAMPLES]) if found],
        costs=_costs(adapter, report, evaluation),
        untested=_untested(fit, report, evaluation),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _figure(value: Any) -> str | None:
    """A share or mean from JSON as text; None for anything else, and if nothing was counted."""
    value = _mapping(value)
    known = all(_number(value.get(name)) is not None for name in ("value", "low", "high"))
    return share_text(dict(value)) if known else None


def _what(adapter: SteeringAdapter, gate: Mapping[str, Any]) -> str:
    about = adapter.config.fit.get("about")
    start = f"{about.strip().rstrip('.')}. " if isinstance(about, str) and about.strip() else ""
    base = base_name(adapter) or "its base model"
    whose = "on prompts for which its gate opens, and leaves others unchanged" if gate else "on every prompt"
    method = get_steering_method(adapter.config.steering_type)
    return (
        f"{start}It moves the answers of {base} towards those preferred in its training data, {whose}. "
        f"{method.name}: {method.summary}"
    )


def _effect(evaluation: list[dict[str, Any]]) -> str:
    for row in evaluation:
        before, after = _figure(row.get("unsteered")), _figure(row.get("steered"))
        if before and after:
            return f"{row.get('dataset')}, {row.get('metric')}: {before} unsteered, {after} steered."
    return ""


def _example(value: Any) -> Example | None:
    found = _mapping(value)
    texts = [found.get(name) for name in ("prompt", "unsteered", "steered")]
    if not all(isinstance(text, str) for text in texts):
        return None
    prompt, unsteered, steered = (_shortened(str(text)) for text in texts)
    gate = _number(found.get("gate"))
    remarks = [str(found.get("source") or ""), "" if gate is None else f"gate {gate:.2f}", "greedy answers"]
    return Example(prompt, unsteered, steered, "; ".join(remark for remark in remarks if remark))


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ANSWER else f"{line[:_LONGEST_ANSWER].rsplit(' ', 1)[0]} ..."


def _costs(adapter: SteeringAdapter, report: Mapping[str, Any], evaluation: list[dict[str, Any]]) -> list[str]:
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
    costs = [f"Memory: {size:,} bytes beside the model."]
    same = [
        f"{row.get('dataset')}: {_figure(row.get('steered'))}"
        for row in evaluation
        if row.get("metric") == "identical output" and _figure(row.get("steered"))
    ]
    if same:
        costs.append(f"General answers identical to the base's, token by token: {'; '.join(same)}.")
    for row in evaluation:
        before, after = (_number(_mapping(row.get(side)).get("value")) for side in ("unsteered", "steered"))
        if str(row.get("metric", "")).startswith("own words") and before is not None and after is not None:
            lost = before - after
            how = "less" if lost >= 0 else "more"
            costs.append(f"Its answers are {abs(lost):.2f} nats per token {how} likely under the base.")
    gate = _mapping(report.get("gate"))
    alarms, misses = _figure(gate.get("false_alarms")), _figure(gate.get("misses"))
    if alarms:
        costs.append(f"The gate opens on held-out general prompts: {alarms}.")
    if misses:
        costs.append(f"The gate stays closed on held-out prompts that it should steer: {misses}.")
    if report and not gate:
        costs.append("It has no gate: every prompt is steered, general ones too.")
    curve = [_mapping(point) for point in _list(report.get("dose_response"))]
    chosen = [point for point in curve if point.get("strength") == adapter.config.strength]
    divergence = _number(chosen[0].get("kl")) if chosen else None
    if divergence is not None:
        costs.append(f"Divergence of general prompts' next tokens, 95th percentile: {divergence:.3g} nats.")
    return costs


def _untested(fit: Mapping[str, Any], report: Mapping[str, Any], evaluation: list[dict[str, Any]]) -> list[str]:
    asked = list(dict.fromkeys(str(row.get("dataset")) for row in evaluation))
    untested = [
        f"Anything other than {'; '.join(asked)}."
        if asked
        else "Any benchmark: the only figures are from the fit's own rows.",
        "Other base models, fine-tunes and quantisations of the one that it was fitted on.",
        "Sampling, long answers, later chat turns, other languages, system prompts and templates, unless a data "
        "set's name says so.",
    ]
    if fit.get("held_out") is False:
        untested.append("New prompts: there were too few rows to hold any out, so the fit's figures are in-sample.")
    elif fit.get("split") == "prompt":
        untested.append("New kinds of prompts: the fit held out prompts, not whole categories.")
    limits = _mapping(report.get("gate")).get("not_guaranteed")
    if isinstance(limits, str):
        untested.append(f"The gate guarantees nothing about {limits.removeprefix('anything about ')}.")
    untested.append("Attempts to get around it: steering makes a behaviour less likely, but does not rule it out.")
    return untested
