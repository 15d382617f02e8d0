"""FASB at run time: gate (if any), track, backtrack, steer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from finesteer_hf.adapters.tensor_files import HEAD_SIZE, Shape
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.methods._shared.heads import HeadFit, fit_heads, head_sites
from finesteer_hf.methods._shared.heads_config import dense_shift, require_heads
from finesteer_hf.methods._shared.rows import json_ready
from finesteer_hf.methods.fasb.config import FASBConfig
from finesteer_hf.methods.query_gate import (
    QueryGate,
    candidate_reads,
    check_values,
    choose_read_site,
    fit_gate,
    gate_shapes,
)
from finesteer_hf.processors import Decision, QueryStates, SteeringProcessor, StepView, TokenView
from finesteer_hf.sites import Site


TENSORS = ("probes.weight", "probes.bias", "directions", "sigma")
# Larger than any distance of a token from its query.
NEVER = 1 << 40
_CUTS = "tokens cannot be taken back there: "


class FASB(SteeringMethod[FASBConfig]):
    """`x^{l,h} <- x^{l,h} + r * sigma^{l,h} * theta^{l,h}`, with r from the deviation of the heads' states.

    The deviation of a state is the mean over the heads of 1 - p(wanted). Once `backtrack` tokens exist, and when a
    text ends, the state behind the newest token is judged. Above the threshold, the newest tokens are dropped and
    generated again, steered with r = strength * deviation from the last kept token on.

    A forward over prompt and answer (`prompt_lengths`) first reads the answer unsteered, finds the token at which
    generation of this text would have gone back, and steers from where it would have continued.

    With a gate, r is multiplied by the query's g, and rows with g = 0 are left unchanged.

    Args:
        config: a fitted `FASBConfig`.
        tensors: `probes.weight` and `directions` `[k, head size]`, `probes.bias` and `sigma` `[k]`, float32; with a gate
            its `gate.*`, named as in a FineSteer adapter.

    Raises:
        AdapterFileError: if the config is not fitted, or a tensor is missing or has values that no fit writes.
    """

    refuses: ClassVar[Mapping[str, str]] = {
        "beams": _CUTS + "beams are candidates of one length",
        "mixed_rows_with_beams": _CUTS + "beams are candidates of one length",
        "output_steering_of_beams": _CUTS + "beams are candidates of one length",
        "prompt_lookup": _CUTS + "candidates are accepted several at a time",
        "assisted": _CUTS + "candidates are accepted several at a time",
        "static_cache": _CUTS + "its rows cannot move",
        "compiled_static_cache": _CUTS + "its rows cannot move",
        "guidance": _CUTS + "the unconditional sequence has its own cache",
        "inputs_embeds": "a text that restarts from its prompt needs the prompt's ids",
        "carried_cache": "a hand-written decoding loop cannot take tokens back (`generate` on a carried cache can)",
    }
    differs: ClassVar[Mapping[str, str]] = {
        "prompt_lengths": "a text shows what was kept, not what was taken back: scoring judges the given text"
    }

    def __init__(self, config: FASBConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        self.settings = settings = config
        require_heads(settings, tensors, TENSORS)
        self.maps = tuple(settings.of_site)
        self.lookback = settings.backtrack
        shifts = tensors["sigma"][:, None] * tensors["directions"]
        self.tensors = {}
        for site, rows in settings.of_site.items():
            self.tensors |= {
                f"{site}.heads": torch.tensor([settings.heads[row][1] for row in rows]),
                f"{site}.weight": tensors["probes.weight"][rows],
                f"{site}.bias": tensors["probes.bias"][rows],
                f"{site}.shift": dense_shift(settings, rows, shifts),
            }
        self._gate: QueryGate | None = None
        if settings.gate != "always":
            self._add_gate(tensors)

    def _add_gate(self, tensors: Mapping[str, torch.Tensor]) -> None:
        names = list(gate_shapes(self.settings))
        missing = sorted(set(names) - set(tensors))
        if missing:
            raise AdapterFileError(
                f"The FASB adapter lacks the tensors {missing}, which its gate={self.settings.gate!r} needs."
            )
        check_values(tensors)
        self._gate = QueryGate(self.settings)
        self.reads = (Site.parse(str(self.settings.read_site)),)
        self.tensors |= {name: tensors[name] for name in names} | self._gate.lay_out(tensors)

    # -- once per query -----------------------------------------------------------------------------------------------

    def decide(self, queries: QueryStates) -> Decision:
        """The gate `[rows]` of the queries, and its `score` for the record; called only if there is a gate."""
        assert self._gate is not None
        h = queries[self.reads[0]]
        gate, score = self._gate(h, self.parameters_on(h.device))
        return Decision(vectors={}, gate=gate, record={"score": score})

    # -- while a text is generated ------------------------------------------------------------------------------------

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Record the newest state's deviation, and shift the tokens to steer.

        Raises:
            ValueError: for `compat="official"` with a cache.
        """
        memory = view.state
        if self.settings.compat == "official" and not view.in_prompt:
            raise ValueError(
                "compat='official' shifts the newest position of a text that is recomputed at each step: generate with "
                "use_cache=False, or fit with compat=None."
            )
        if view.decision is not None:
            memory["gate"] = view.decision.gate
        if not memory.get("reviewed"):
            deviation = self._deviation(site, view.newest(hidden))
            memory["deviation"] = deviation if site == self.maps[0] else memory["deviation"].to(deviation) + deviation
        if not memory.get("events"):
            return hidden
        coefficient = self._coefficient(hidden, view) * (self.strength * view.scale[..., 0])
        shift = coefficient[..., None] * self.parameters_on(hidden.device)[f"{site}.shift"]
        # x + -0.0 is x to the bit.
        return hidden + torch.where(coefficient[..., None] == 0, -0.0, shift).to(hidden.dtype)

    def watch(self, step: StepView) -> torch.Tensor:
        """Judge the rows; those that deviate backtrack.

        Returns:
            int64 `[rows]`: number of tokens to drop.
        """
        memory, written, back = step.state, step.new_tokens, self.settings.backtrack
        deviation = memory["deviation"].to(written.device) / len(self.settings.heads)
        if "floor" not in memory:
            memory["floor"] = memory["due"] = torch.zeros_like(written)
            memory["steered"] = torch.zeros_like(step.ended)
            memory["backtracked_at"] = torch.full_like(written, -1)
            memory["trigger_score"] = torch.full_like(deviation, torch.nan)
            memory["current"] = torch.zeros_like(deviation)
        deviates, since = deviation > self.settings.threshold, written - memory["floor"]
        tracked = step.active
        if self._gate is not None:
            tracked = tracked & (memory["gate"].to(tracked.device) != 0)
        goes = tracked & ~memory["steered"] & deviates & ((since >= back) | step.ended)
        due = torch.zeros_like(goes)
        if self.settings.recheck:
            due = tracked & memory["steered"] & ~step.ended & (written >= memory["due"])
        if not bool((goes | due).any()):
            return torch.zeros_like(written)
        kept = torch.where(since > back, written - back, memory["floor"])
        released = due & ~deviates
        value = deviation if self.settings.adaptive else torch.ones_like(deviation)
        start = torch.where(goes, kept, torch.where(due, written, NEVER))
        memory.setdefault("events", []).append((start, torch.where(released, 0.0, value)))
        memory["current"] = torch.where(released, 0.0, torch.where(goes | due, value, memory["current"]))
        memory["steered"] = (memory["steered"] | goes) & ~released
        memory["due"] = torch.where(goes, kept + back, torch.where(due, written + back, memory["due"]))
        memory["floor"] = torch.where(released, written, memory["floor"])
        first = goes & (memory["backtracked_at"] < 0)
        memory["backtracked_at"] = torch.where(first, kept, memory["backtracked_at"])
        memory["trigger_score"] = torch.where(first, deviation, memory["trigger_score"])
        return torch.where(goes, written - kept, 0)

    def records(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`backtracked_at`: number of new tokens that a row kept when it first went back, -1 if it never did; and
        `trigger_score`: its deviation then, else NaN. If there is a gate, also the gate and its score.
        """
        return {name: state[name] for name in ("backtracked_at", "trigger_score") if name in state}

    # -- when a text is scored ----------------------------------------------------------------------------------------

    def review(self, states: Mapping[Site, torch.Tensor], view: TokenView) -> None:
        """Find for each row where generation would have gone back, and from where it would have steered."""
        first, settings = states[self.maps[0]], self.settings
        per_site = [self._deviation(site, states[site]).to(first.device) for site in self.maps]
        deviation = torch.stack(per_site).sum(0) / len(settings.heads)
        index = view.since_query(first).expand(deviation.shape)
        real = index >= 0 if view.mask is None else view.mask.expand(deviation.shape) & (index >= 0)
        last = torch.where(real, index, -1).amax(dim=1, keepdim=True)
        if settings.compat == "official":
            tested = real & (index >= 1) & ((index > settings.backtrack) | (index == last))
        else:
            # The state of token i chooses token i + 1, which makes i + 1 tokens; the last state chooses nothing.
            tested = real & (index < last) & ((index + 1 >= settings.backtrack) | (index + 1 == last))
        triggers = tested & (deviation > settings.threshold)
        at = triggers.int().argmax(dim=1)
        rows = torch.arange(len(at), device=at.device)
        found = index[rows, at]
        if settings.compat == "official":
            start = (found - settings.backtrack).clamp(min=1)
        else:
            start = (found + 1 - settings.backtrack).clamp(min=0)
        value = deviation[rows, at] if settings.adaptive else torch.ones_like(deviation[rows, at])
        view.state["events"] = [(torch.where(triggers.any(dim=1), start, NEVER), value)]
        view.state["reviewed"] = True

    # -- arithmetic ---------------------------------------------------------------------------------------------------

    def _deviation(self, site: Site, states: torch.Tensor) -> torch.Tensor:
        """Sum over a block's chosen heads of 1 - p(wanted), `[...]` float32 of states `[..., width]`."""
        own = self.parameters_on(states.device)
        weight = own[f"{site}.weight"]
        heads = states.float().unflatten(-1, (-1, weight.shape[1]))[..., own[f"{site}.heads"], :]
        return torch.sigmoid(-((heads * weight).sum(-1) + own[f"{site}.bias"])).sum(-1)

    def _coefficient(self, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """r / alpha of each token of a forward, `[rows, tokens]` float32."""
        memory = view.state
        if not view.in_prompt:
            return self._gated(memory["current"].to(hidden.device)[:, None], memory)
        index = view.since_query(hidden)
        coefficient = torch.zeros(hidden.shape[:2], device=hidden.device)
        for start, value in memory["events"]:
            here = index >= start.to(hidden.device)[:, None]
            coefficient = torch.where(here, value.to(hidden.device)[:, None], coefficient)
        named = view.mask
        if self.settings.compat == "official" and not memory.get("reviewed"):
            columns = torch.arange(hidden.shape[1], device=hidden.device)[None]
            newest = hidden.shape[1] - 1 if view.last_index is None else view.last_index[:, None]
            named = columns == newest
        return self._gated(coefficient if named is None else torch.where(named, coefficient, 0.0), memory)

    def _gated(self, coefficient: torch.Tensor, memory: Mapping[str, Any]) -> torch.Tensor:
        """Coefficients `[rows, tokens]` times each row's gate."""
        return coefficient if self._gate is None else coefficient * memory["gate"].to(coefficient.device)[:, None]

    # -- fit ----------------------------------------------------------------------------------------------------------

    @classmethod
    def tensor_shapes(cls, config: FASBConfig) -> dict[str, Shape]:
        """One row per head, and the gate's tensors."""
        count = len(config.heads)
        return {
            "probes.weight": (count, HEAD_SIZE),
            "probes.bias": (count,),
            "directions": (count, HEAD_SIZE),
            "sigma": (count,),
            **gate_shapes(config),
        }

    @classmethod
    def needs(cls, config: FASBConfig, info: ModelInfo) -> CaptureRequest:
        """The head outputs of the probed blocks, see `head_sites`; with a gate, the queries at its candidate sites.

        Raises:
            ValueError: if a block or the read site is out of the model's range.
        """
        heads = head_sites(config, info)
        if config.gate == "always":
            return heads
        return CaptureRequest((*heads.sites, *candidate_reads(config, info)), ("query", *heads.pools))

    @classmethod
    def fit(cls, data: FitData, config: FASBConfig) -> FitResult:
        """Fit the gate if there is one, choose the heads on the `calibration` part, their number and alpha on `validation`.

        See `fit_gate` for the gate's data. Alpha is chosen with the gate in place, on answers steered as in
        generation.

        Raises:
            DatasetError: for too few rows, or a gate that needs general prompts when there are none.
        """
        settings, gate, figures = config, dict[str, torch.Tensor](), dict[str, Any]()
        if settings.gate != "always":
            settings, gate, figures = _with_gate(data, settings)

        def build(found: HeadFit, strength: float) -> SteeringProcessor:
            return cls(found.filled_in(settings, data.info, strength), {**gate, **found.tensors})

        found, strength, report = fit_heads(data, settings, build)
        fitted = found.filled_in(settings, data.info, strength)
        return FitResult(fitted, {**gate, **found.tensors}, {**report, **figures})


def _with_gate(data: FitData, config: FASBConfig) -> tuple[FASBConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """The config with the gate's choices, the gate's tensors, and its figures."""
    read, told = choose_read_site(data, config)
    data.note(f"fitting the gate at {read}")
    gate = fit_gate(config, data, read)
    fitted = dataclasses.replace(config, read_site=str(read), gate_score=gate.score, subspace_rank=gate.subspace_rank)
    figures = {"gate": gate.report, "gate_scores": gate.scores, "read_sites": told}
    return fitted, gate.tensors, json_ready(figures)
