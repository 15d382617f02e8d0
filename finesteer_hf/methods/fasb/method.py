"""FASB at run time: track, take back, steer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch

from finesteer_hf.config import SteeringConfig
from finesteer_hf.methods.base import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.methods.fasb.config import FASBConfig
from finesteer_hf.methods.heads import dense_shift, fit_heads, head_sites, require_heads
from finesteer_hf.processors import StepView, TokenView
from finesteer_hf.sites import Site


TENSORS = ("probes.weight", "probes.bias", "directions", "sigma")
# No token stands so far after its query.
NEVER = 1 << 40
_CUTS = "tokens cannot be taken back there: "


class FASB(SteeringMethod):
    """`x^{l,h} <- x^{l,h} + r * sigma^{l,h} * theta^{l,h}`, with r from the deviation of the heads' states.

    The deviation of a state is the mean over the heads of 1 - p(wanted). Once `backtrack` tokens exist, and when a text
    ends, the state that the newest token was chosen from is judged; above the threshold, the newest tokens are taken
    back and written again, steered with r = strength * deviation from the last kept token on.

    A forward over prompt and answer (`prompt_lengths`) first reads the answer unsteered, finds the token at which
    generation would have gone back had it written this text, and steers from where it would have gone on.

    Args:
        config: a fitted `FASBConfig`.
        tensors: `probes.weight` and `directions` `[k, head size]`, `probes.bias` and `sigma` `[k]`, float32.
    """

    config_cls = FASBConfig
    refuses: ClassVar[Mapping[str, str]] = {
        "beams": _CUTS + "beams are candidates of one length",
        "mixed_rows_with_beams": _CUTS + "beams are candidates of one length",
        "output_steering_of_beams": _CUTS + "beams are candidates of one length",
        "prompt_lookup": _CUTS + "candidates are accepted several at a time",
        "assisted": _CUTS + "candidates are accepted several at a time",
        "static_cache": _CUTS + "its rows cannot move",
        "compiled_static_cache": _CUTS + "its rows cannot move",
        "guidance": _CUTS + "the unconditional sequence has a cache of its own",
        "inputs_embeds": "a text that restarts from its prompt needs the prompt's ids",
        "carried_cache": "a decoding loop written by hand cannot take tokens back (`generate` on a carried cache can)",
    }
    differs: ClassVar[Mapping[str, str]] = {
        "prompt_lengths": "a text says what was kept, not what was taken back: scoring judges the text that it is given"
    }

    def __init__(self, config: SteeringConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        self.settings = settings = cast(FASBConfig, config)
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
                f"{site}.shift": dense_shift(settings, site, shifts),
            }

    # -- while a text is generated ------------------------------------------------------------------------------------

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Note the newest state's deviation, and shift the tokens that are to be steered.

        Raises:
            ValueError: for `compat="official"` with a cache.
        """
        memory = view.state
        if self.settings.compat == "official" and not view.in_prompt:
            raise ValueError(
                "compat='official' shifts the newest position of a text that is read anew at each step: generate with "
                "use_cache=False, or fit with compat=None."
            )
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
        """Judge the rows; those that deviate go back.

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
        goes = step.active & ~memory["steered"] & deviates & ((since >= back) | step.ended)
        due = torch.zeros_like(goes)
        if self.settings.recheck:
            due = step.active & memory["steered"] & ~step.ended & (written >= memory["due"])
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
        `trigger_score`: its deviation then, else NaN.
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
            # The state of token i chose token i + 1, with which the text had i + 1 tokens; the last one chose nothing.
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
            current: torch.Tensor = memory["current"].to(hidden.device)[:, None]
            return current
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
        return coefficient if named is None else torch.where(named, coefficient, 0.0)

    # -- fit ----------------------------------------------------------------------------------------------------------

    @classmethod
    def tensor_shapes(cls, config: SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        """One row a head."""
        count = len(cast(FASBConfig, config).heads)
        return {
            "probes.weight": (count, None),
            "probes.bias": (count,),
            "directions": (count, None),
            "sigma": (count,),
        }

    @classmethod
    def needs(cls, config: SteeringConfig, info: ModelInfo) -> CaptureRequest:
        """The head outputs of the probed blocks; see `head_sites`."""
        return head_sites(cast(FASBConfig, config), info)

    @classmethod
    def fit(cls, data: FitData, config: SteeringConfig) -> FitResult:
        """Choose the heads on the `calibration` part and alpha on `validation`, scored as `review` says.

        Raises:
            DatasetError: for too few rows.
        """
        settings = cast(FASBConfig, config)
        found = fit_heads(data, settings)
        trial = found.trial(lambda strength: cls(found.filled_in(settings, data.info, strength), found.tensors))
        strength, curve, why = trial.choose_strength(settings.strength, data)
        report = {**found.report, "strength": why, "dose_response": [dataclasses.asdict(point) for point in curve]}
        return FitResult(found.filled_in(settings, data.info, strength), found.tensors, report)
